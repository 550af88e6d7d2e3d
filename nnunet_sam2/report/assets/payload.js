// A case's pictures: found in the page, taken apart when they are first wanted, the last few kept.
// The layout of a block is described in pictures.py.

const DATA = JSON.parse(document.getElementById("data").textContent);
const CLASSES = DATA.classes.map(([value, name], index) => ({ value, name, index: index + 1, style: `k${(index % 10) + 1}` }));
const CLASS_OF = new Map(CLASSES.map((one) => [one.value, one]));
const IGNORED = 255;
const CONFIDENCE_LEVELS = 7;
const KEPT_CASES = 12;

const keptCases = new Map();

const wholePage = new Promise((resolve) => {
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", resolve, { once: true });
  else resolve();
});

/** Resolve to a case's pictures: header, bitmap of all slices, maps, story. */
function picturesOf(index) {
  if (keptCases.has(index)) {
    const kept = keptCases.get(index);
    keptCases.delete(index);
    keptCases.set(index, kept);
    return kept;
  }
  const wanted = readBlock(index);
  keptCases.set(index, wanted);
  wanted.catch(() => keptCases.delete(index));
  if (keptCases.size > KEPT_CASES) keptCases.delete(keptCases.keys().next().value);
  return wanted;
}

async function readBlock(index) {
  const id = `px${index}`;
  // Blocks come after the scripts: the page can be used before all of them have been read.
  if (!document.getElementById(id)) await wholePage;
  const bytes = fromBase64(document.getElementById(id).textContent);
  const length = new DataView(bytes.buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + length)));
  const part = (name) => {
    const [offset, size, deflated] = header.parts[name];
    const raw = bytes.subarray(4 + length + offset, 4 + length + offset + size);
    return deflated ? inflate(raw) : raw;
  };
  const [bitmap, maps] = await Promise.all([
    createImageBitmap(new Blob([part("image")], { type: "image/webp" })),
    part("maps"),
  ]);
  const [rows, cols] = header.size;
  const voxels = rows * cols * header.slices.length;
  const planes = {};
  header.planes.forEach((name, n) => (planes[name] = maps.subarray(n * voxels, (n + 1) * voxels)));
  return {
    header, bitmap, planes, rows, cols,
    count: header.slices.length,
    surface: () => part("volume"),
    story: async () => new TextDecoder().decode(await part("story")),
    fullest: fullestSlice(planes.last || planes.first || planes.human, header.slices.length, rows * cols),
  };
}

function fromBase64(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Return the slice that shows most of all classes, each counted as a share of itself: where a case is opened. */
function fullestSlice(plane, count, size) {
  if (!plane) return Math.floor(count / 2);
  const found = Array.from({ length: count }, () => new Uint32Array(256));
  const total = new Uint32Array(256);
  for (let n = 0; n < count; n++) for (let i = n * size; i < (n + 1) * size; i++) found[n][plane[i]]++, total[plane[i]]++;
  let best = Math.floor(count / 2), most = 0;
  for (let n = 0; n < count; n++) {
    let share = 0;
    for (const one of CLASSES) if (total[one.index]) share += found[n][one.index] / total[one.index];
    if (share > most) [best, most] = [n, share];
  }
  return best;
}
