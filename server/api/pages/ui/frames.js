// When the page has time: between two frames, or while nothing else happens. Work that takes long
// is done in slices, so that the page can be scrolled and written in meanwhile.

/** Resolves with the next frame, or soon where none is drawn: in a hidden page, without a browser. */
export function nextFrame() {
  const { document, requestAnimationFrame, scheduler } = globalThis;
  if (!requestAnimationFrame || document.hidden) return scheduler?.yield?.() ?? soon();
  return new Promise((resolve) => {
    // A page that is hidden meanwhile gets no frame.
    const go = () => {
      document.removeEventListener("visibilitychange", go);
      resolve();
    };
    document.addEventListener("visibilitychange", go);
    requestAnimationFrame(go);
  });
}

/** Run each function in turn, while the page is idle. */
export function whenIdle(...functions) {
  const next = globalThis.requestIdleCallback ?? setTimeout;
  const [first, ...others] = functions;
  if (!first) return;
  next(() => {
    first();
    whenIdle(...others);
  });
}

function soon() {
  return new Promise((resolve) => { setTimeout(resolve); });
}
