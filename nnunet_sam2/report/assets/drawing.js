// One slice on a canvas: image, tints, outlines.

// Bright enough for black pictures, whatever the page's colours; in the order of the style sheet's k1 to k10.
const BRIGHT = ["#ff8a3d", "#43b4ff", "#3ddc97", "#ff74b3", "#f5d547", "#a594ff", "#55dce0", "#ff6b66", "#b2e05a", "#d9a67b"];
const DOUBT = [214, 92, 255];
const CHANGED = [255, 221, 87];

const brightOf = (index) => BRIGHT[(index - 1) % BRIGHT.length];

/** How a slice is looked at: enlarged about a point (shares of width and height), and its level and window in grey values. */
const PLAIN = { zoom: 1, x: 0.5, y: 0.5, level: 127.5, window: 255 };

/** Spread the grey values of the window over black to white. */
function rewindow(context, width, height, { level, window }) {
  if (level === PLAIN.level && window === PLAIN.window) return;
  const table = Uint8ClampedArray.from({ length: 256 }, (_, grey) => 255 * ((grey - level) / window + 0.5));
  const image = context.getImageData(0, 0, width, height);
  for (let i = 0; i < image.data.length; i++) if (i % 4 !== 3) image.data[i] = table[image.data[i]];
  context.putImageData(image, 0, 0);
}

/**
 * Draw slice n of a case on a canvas, width x height in device pixels.
 * show: which of first, last, human, confidence, changed; hidden: set of class indices that are not drawn.
 */
function drawSlice(canvas, pictures, n, { show, hidden, width, height, line, look = PLAIN }) {
  canvas.width = width;
  canvas.height = height;
  const { rows, cols, header, bitmap, planes } = pictures;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  const left = (n % header.across) * cols, top = Math.floor(n / header.across) * rows;
  const { zoom } = look;
  context.setTransform(zoom, 0, 0, zoom, width * (0.5 - zoom * look.x), height * (0.5 - zoom * look.y));
  context.drawImage(bitmap, left, top, cols, rows, 0, 0, width, height);
  rewindow(context, width, height, look);
  if (show.confidence && planes.confidence) {
    tint(context, planes.confidence, n, pictures, DOUBT, (level) => 0.62 * (1 - level / CONFIDENCE_LEVELS), width, height);
  }
  if (show.changed && planes.first && planes.last) {
    const other = planes.last;
    const offset = n * rows * cols;
    const seen = (index) => index && index !== IGNORED && !hidden.has(index);
    tint(context, planes.first, n, pictures, CHANGED,
      (index, i) => (index !== other[offset + i] && (seen(index) || seen(other[offset + i])) ? 0.55 : 0), width, height);
  }
  context.save();
  context.scale(width / cols, height / rows);
  const pixel = cols / width;
  const unit = (line * pixel) / zoom;
  if (show.first && planes.first) outline(context, planes.first, n, pictures, hidden, { width: unit * 1.1, part: 0.5 });
  if (show.last && planes.last) outline(context, planes.last, n, pictures, hidden, { width: unit * 2 });
  if (show.human && planes.human) outline(context, planes.human, n, pictures, hidden, { width: unit * 1.7, part: 0.3, colour: "#ffffff" });
  context.restore();
}

function tint(context, plane, n, { rows, cols }, [r, g, b], strength, width, height) {
  const layer = new OffscreenCanvas(cols, rows);
  const image = new ImageData(cols, rows);
  const offset = n * rows * cols;
  for (let i = 0; i < rows * cols; i++) {
    const alpha = strength(plane[offset + i], i);
    if (alpha > 0) image.data.set([r, g, b, 255 * alpha], 4 * i);
  }
  layer.getContext("2d").putImageData(image, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(layer, 0, 0, width, height);
  context.imageSmoothingEnabled = true;
}

/** Draw the outlines of all classes of one label map; with part below 1, that share of each piece: dashes. */
function outline(context, plane, n, { rows, cols }, hidden, { width, part = 1, colour }) {
  const paths = new Map();
  const offset = n * rows * cols;
  const at = (x, y) => (x < 0 || y < 0 || x >= cols || y >= rows ? 0 : plane[offset + y * cols + x]);
  for (let y = -1; y < rows; y++) {
    for (let x = -1; x < cols; x++) {
      const a = at(x, y), b = at(x + 1, y), c = at(x + 1, y + 1), d = at(x, y + 1);
      if (a === b && b === c && c === d) continue;
      for (const index of new Set([a, b, c, d])) {
        if (!index || index === IGNORED || hidden.has(index)) continue;
        if (!paths.has(index)) paths.set(index, new Path2D());
        cell(paths.get(index), x, y, (a === index) | ((b === index) << 1) | ((c === index) << 2) | ((d === index) << 3), part);
      }
    }
  }
  context.lineWidth = width;
  context.lineCap = part < 1 ? "butt" : "round";
  for (const [index, path] of paths) {
    context.strokeStyle = colour || brightOf(index);
    context.stroke(path);
  }
}

// Marching squares: which sides of the cell between four pixel centres an outline joins (0 top, 1 right, 2 bottom, 3 left).
const JOINS = [[], [3, 0], [0, 1], [3, 1], [1, 2], [3, 0, 1, 2], [0, 2], [3, 2], [2, 3], [2, 0], [0, 1, 2, 3], [2, 1], [1, 3], [1, 0], [0, 3], []];
const SIDES = [[1, 0.5], [1.5, 1], [1, 1.5], [0.5, 1]];

function cell(path, x, y, corners, part) {
  const joins = JOINS[corners];
  for (let i = 0; i < joins.length; i += 2) {
    const [x1, y1] = SIDES[joins[i]], [x2, y2] = SIDES[joins[i + 1]];
    const cut = (1 - part) / 2;
    path.moveTo(x + x1 + (x2 - x1) * cut, y + y1 + (y2 - y1) * cut);
    path.lineTo(x + x2 - (x2 - x1) * cut, y + y2 - (y2 - y1) * cut);
  }
}
