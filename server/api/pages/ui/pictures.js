// Pictures before they are sent: turned upright, converted or scaled down only where they must be.

import { randomId } from "./ids.js";

const SENT_AS_IS = new Set(["image/png", "image/jpeg", "image/webp", "image/gif"]);
const JPEG_QUALITY = 0.92;

/** A file that cannot become a picture; the message is for the user. */
export class PictureError extends Error {}

/** The media type of an image by its first bytes; null for what browsers must be asked about. */
export function mediaType(bytes) {
  const starts = (...values) => values.every((value, at) => bytes[at] === value);
  if (starts(0x89, 0x50, 0x4e, 0x47)) return "image/png";
  if (starts(0xff, 0xd8, 0xff)) return "image/jpeg";
  if (starts(0x47, 0x49, 0x46, 0x38)) return "image/gif";
  if (starts(0x52, 0x49, 0x46, 0x46) && bytes[8] === 0x57 && bytes[9] === 0x45) return "image/webp";
  return null;
}

/** The EXIF orientation of a JPEG, 1 to 8; 1 where there is none. bytes: a Uint8Array. */
export function orientationOf(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  try {
    let at = 2;
    while (view.getUint8(at) === 0xff) {
      const marker = view.getUint8(at + 1);
      const length = view.getUint16(at + 2);
      if (marker === 0xda) return 1;
      if (marker === 0xe1 && view.getUint32(at + 4) === 0x45786966) return readExif(view, at + 10);
      at += 2 + length;
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
  }
  return 1;
}

function readExif(view, start) {
  const isLittle = view.getUint16(start) === 0x4949;
  const first = start + view.getUint32(start + 4, isLittle);
  const count = view.getUint16(first, isLittle);
  for (let entry = 0; entry < count; entry += 1) {
    const at = first + 2 + 12 * entry;
    if (view.getUint16(at, isLittle) === 0x0112) {
      const value = view.getUint16(at + 8, isLittle);
      return value >= 1 && value <= 8 ? value : 1;
    }
  }
  return 1;
}

/** By how much a picture must be scaled for the limits, and why. factor is 1 if it fits. */
export function scaleFor(width, height, limits) {
  const bySide = limits.max_side / Math.max(width, height);
  const byPixels = Math.sqrt(limits.max_pixels / (width * height));
  const factor = Math.min(1, bySide, byPixels);
  if (factor === 1) return { factor, reason: "" };
  const reason = bySide < byPixels
    ? `${limits.max_side.toLocaleString("en")} pixels a side`
    : `${Math.floor(limits.max_pixels / 1e6)} megapixels`;
  return { factor, reason };
}

/**
 * The picture of a file: { id, name, url, width, height, bytes, notes }. url is a data: URL.
 * limits: of /v1/playground. Throws PictureError.
 */
export async function pictureOf(file, limits) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  const type = mediaType(bytes);
  let bitmap;
  try {
    bitmap = await createImageBitmap(new Blob([bytes], { type: type ?? file.type }), { imageOrientation: "from-image" });
  } catch {
    throw new PictureError(`${file.name || "This file"} is not a picture that this browser can read.`);
  }
  try {
    return await sendable(file, bytes, type, bitmap, limits);
  } finally {
    bitmap.close();
  }
}

async function sendable(file, bytes, type, bitmap, limits) {
  const notes = [];
  const { factor, reason } = scaleFor(bitmap.width, bitmap.height, limits);
  const isTurned = type === "image/jpeg" && orientationOf(bytes) !== 1;
  if (isTurned) notes.push("Turned upright.");
  if (!SENT_AS_IS.has(type)) notes.push("Converted to JPEG.");
  let [width, height] = [Math.max(1, Math.floor(bitmap.width * factor)), Math.max(1, Math.floor(bitmap.height * factor))];
  if (factor < 1) notes.push(scaledNote(bitmap, width, height, reason));
  let data = bytes;
  let sentType = type;
  if (notes.length || bytes.length > limits.max_image_bytes) {
    sentType = type === "image/png" && bytes.length <= limits.max_image_bytes ? "image/png" : "image/jpeg";
    data = await drawn(bitmap, width, height, sentType);
    let isSmaller = false;
    while (data.length > limits.max_image_bytes && width > 1 && height > 1) {
      [width, height] = [Math.floor(width * 0.8), Math.floor(height * 0.8)];
      data = await drawn(bitmap, width, height, "image/jpeg");
      [sentType, isSmaller] = ["image/jpeg", true];
    }
    const limit = `${Math.round(limits.max_image_bytes / 2 ** 20)} MiB`;
    if (isSmaller) notes.push(scaledNote(bitmap, width, height, limit));
    else if (!notes.length) notes.push(`Stored as JPEG: the server takes at most ${limit}.`);
  }
  const url = await dataUrl(data, sentType);
  return { id: randomId(), name: file.name || "picture", url, width, height, bytes: data.length, notes };
}

function scaledNote(bitmap, width, height, limit) {
  return `Scaled from ${bitmap.width} × ${bitmap.height} to ${width} × ${height}: the server takes at most ${limit}.`;
}

async function drawn(bitmap, width, height, type) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  if (type === "image/jpeg") {
    context.fillStyle = "#fff";
    context.fillRect(0, 0, width, height);
  }
  context.drawImage(bitmap, 0, 0, width, height);
  const blob = await new Promise((resolve) => { canvas.toBlob(resolve, type, JPEG_QUALITY); });
  if (blob === null) throw new PictureError("The picture is too large for this browser.");
  return new Uint8Array(await blob.arrayBuffer());
}

function dataUrl(bytes, type) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(new Blob([bytes], { type }));
  });
}
