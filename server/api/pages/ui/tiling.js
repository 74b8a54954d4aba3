// Which tiles an image becomes: server/images/tiling.py, exactly. Knows nothing of pixels.

/** All grids of at most so many tiles, in the order of their ids. */
export function supportedGrids(maxTiles) {
  const grids = [];
  for (let rows = 1; rows <= maxTiles; rows += 1) {
    for (let columns = 1; columns <= maxTiles; columns += 1) {
      if (rows * columns <= maxTiles) grids.push({ rows, columns });
    }
  }
  return grids;
}

/** The grid that enlarges the image least, else shrinks it least; of equals the smallest. */
export function chooseGrid(height, width, maxTiles, tileSize) {
  const grids = supportedGrids(maxTiles).map((grid) => ({
    ...grid,
    scale: Math.min((grid.rows * tileSize) / height, (grid.columns * tileSize) / width),
  }));
  const enlarging = grids.map((grid) => grid.scale).filter((scale) => scale >= 1);
  const chosen = enlarging.length ? Math.min(...enlarging) : Math.max(...grids.map((grid) => grid.scale));
  let best = null;
  for (const grid of grids) {
    if (grid.scale === chosen && (best === null || grid.rows * grid.columns < best.rows * best.columns)) best = grid;
  }
  return { rows: best.rows, columns: best.columns };
}

/** The size of the image inside its grid: same proportions, at least one tile if possible. */
export function fitToGrid(height, width, grid, tileSize) {
  const targetWidth = Math.min(Math.max(width, tileSize), grid.columns * tileSize);
  const targetHeight = Math.min(Math.max(height, tileSize), grid.rows * tileSize);
  const scaleHeight = targetHeight / height;
  const scaleWidth = targetWidth / width;
  if (scaleWidth < scaleHeight) {
    return { height: Math.min(Math.floor(height * scaleWidth) || 1, targetHeight), width: targetWidth };
  }
  return { height: targetHeight, width: Math.min(Math.floor(width * scaleHeight) || 1, targetWidth) };
}

/** Everything at once: the grid, the size inside it, and the canvas with its padding. */
export function tilesOf(height, width, maxTiles, tileSize) {
  const grid = chooseGrid(height, width, maxTiles, tileSize);
  return {
    ...grid,
    tileSize,
    inner: fitToGrid(height, width, grid, tileSize),
    canvas: { height: grid.rows * tileSize, width: grid.columns * tileSize },
  };
}
