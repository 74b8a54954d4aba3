// What the checks of both JavaScript clients share: the two servers, a picture, and what is true of it.
// Runs beside `node_modules` in an environment of its own; `test_real_clients.py` sets the variables.

import { readFileSync } from "node:fs";

export const url = process.env.SERVER_URL + "/v1";
export const model = process.env.SERVER_MODEL;
export const scriptedUrl = process.env.SCRIPTED_URL + "/v1";
export const scriptedModel = process.env.SCRIPTED_MODEL;
export const picture = "data:image/png;base64," + readFileSync(process.env.SHAPES_PICTURE, "base64");
export const questions = [
  ["What is in this image?", "There is a red circle and a blue triangle on a white background."],
  ["How many shapes are there?", "There are two shapes."],
  ["What colour is the triangle?", "The triangle is blue."],
];
