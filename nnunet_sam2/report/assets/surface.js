// The 3D view: surfaces of the label maps, found in the page and shown by three.js.

const SURFACE_LOOKS = { first: { opacity: 0.3 }, last: { opacity: 1 }, human: { opacity: 0.35, colour: "#ffffff" } };

let scene = null;

/** Show a case's surfaces in a box; throw an Error with a sentence for people where that cannot be. */
async function showSurface(box, pictures, { show, hidden }) {
  const header = pictures.header.surface;
  if (!header) throw new Error(pictures.header.plane === "picture" ? "A picture has no third dimension." : "There is no label to show.");
  await wholePage;
  scene = scene || makeScene(box);
  const volume = await pictures.surface();
  scene.fill(header, volume, { show, hidden });
}

function turnSurface(angle) {
  if (scene) scene.turn(angle);
}

function makeScene(box) {
  let renderer;
  try {
    renderer = new THREE.WebGLRenderer({ antialias: true, alpha: true });
  } catch {
    throw new Error("This browser offers no WebGL here, so there is no 3D view; the slices show the same labels.");
  }
  const world = new THREE.Scene();
  const camera = new THREE.PerspectiveCamera(32, 1, 0.1, 10000);
  const group = new THREE.Group();
  world.add(group, camera, new THREE.HemisphereLight(0xffffff, 0x555566, 1.6));
  const lamp = new THREE.DirectionalLight(0xffffff, 2.2);
  lamp.position.set(-0.6, 0.8, 1);
  camera.add(lamp);
  box.append(renderer.domElement);
  renderer.domElement.setAttribute("aria-label", "Surfaces of the labels; drag to turn");
  const controls = new THREE.OrbitControls(camera, renderer.domElement);
  controls.enablePan = false;
  const draw = () => {
    renderer.render(world, camera);
    drawCompass(camera);
  };
  controls.addEventListener("change", draw);
  let framed = null;

  const fit = () => {
    const { clientWidth: width, clientHeight: height } = box;
    if (!width || !height) return;
    renderer.setPixelRatio(Math.min(2, devicePixelRatio));
    renderer.setSize(width, height);
    camera.aspect = width / height;
    camera.updateProjectionMatrix();
    draw();
  };
  new ResizeObserver(fit).observe(box);

  const clear = () => {
    for (const mesh of [...group.children]) {
      mesh.geometry.dispose();
      mesh.material.dispose();
      group.remove(mesh);
    }
  };

  return {
    turn(angle) {
      camera.position.applyAxisAngle(new THREE.Vector3(0, 1, 0), angle);
      controls.update();
      draw();
    },
    fill(header, volume, { show, hidden }) {
      clear();
      const size = header.shape.reduce((a, b) => a * b);
      header.names.forEach((name, n) => {
        if (!show[name]) return;
        const labels = volume.subarray(n * size, (n + 1) * size);
        for (const one of CLASSES) {
          if (hidden.has(one.index)) continue;
          const shape = surfaceNets(smoothed(labels, header, one.index), header.shape);
          if (!shape.indices.length) continue;
          const geometry = new THREE.BufferGeometry();
          geometry.setAttribute("position", new THREE.BufferAttribute(inSpace(shape.positions, header), 3));
          geometry.setIndex(new THREE.BufferAttribute(shape.indices, 1));
          geometry.computeVertexNormals();
          const look = SURFACE_LOOKS[name];
          const material = new THREE.MeshStandardMaterial({
            color: look.colour || brightOf(one.index), opacity: look.opacity, transparent: look.opacity < 1,
            depthWrite: look.opacity === 1, roughness: 0.6, metalness: 0, side: THREE.DoubleSide,
          });
          group.add(new THREE.Mesh(geometry, material));
        }
      });
      if (framed !== header) {
        framed = header;
        const radius = (Math.hypot(...header.shape) * header.step_mm) / 2;
        // From the front, a little from above and from the side.
        camera.position.set(0.45, 0.35, 1).normalize().multiplyScalar(radius * 2.7);
        camera.near = radius / 50;
        camera.far = radius * 20;
        controls.target.set(0, 0, 0);
        controls.minDistance = radius;
        controls.maxDistance = radius * 9;
        controls.update();
      }
      fit();
    },
  };
}

/** Draw the patient's sides as they lie before the eye; what points away is faint. */
function drawCompass(camera) {
  const canvas = document.getElementById("compass"), context = canvas.getContext("2d");
  const middle = canvas.width / 2;
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.font = "600 24px system-ui, sans-serif";
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.lineWidth = 3;
  const turned = camera.quaternion.clone().invert();
  const sides = [["L", 1, 0, 0], ["R", -1, 0, 0], ["S", 0, 1, 0], ["I", 0, -1, 0], ["A", 0, 0, 1], ["P", 0, 0, -1]];
  const seen = sides.map(([letter, ...at]) => [letter, new THREE.Vector3(...at).applyQuaternion(turned)]);
  for (const [letter, { x, y, z }] of seen.sort(([, a], [, b]) => a.z - b.z)) {
    context.globalAlpha = 0.65 + 0.35 * z;
    context.strokeStyle = context.fillStyle = "#ffffff";
    context.beginPath();
    context.moveTo(middle, middle);
    context.lineTo(middle + 48 * x, middle - 48 * y);
    context.stroke();
    context.fillText(letter, middle + 70 * x, middle - 70 * y);
  }
}

/** Return a class's share of each cube's neighbourhood: 0 to 1. */
function smoothed(labels, { shape, smooth }, index) {
  let field = Float32Array.from(labels, (label) => (label === index ? 1 : 0));
  const [, ny, nx] = shape;
  const strides = [ny * nx, nx, 1];
  for (let round = 0; round < 2; round++) {
    for (let axis = 0; axis < 3; axis++) field = boxBlur(field, shape[axis], strides[axis], smooth[axis]);
  }
  return field;
}

function boxBlur(field, count, stride, radius) {
  const out = new Float32Array(field.length);
  const width = 2 * radius + 1;
  const block = count * stride;
  for (let start = 0; start < field.length; start += block) {
    for (let lane = start; lane < start + stride; lane++) {
      let sum = 0;
      for (let i = -radius; i < count + radius; i++) {
        if (i + radius < count) sum += field[lane + (i + radius) * stride];
        if (i - radius - 1 >= 0) sum -= field[lane + (i - radius - 1) * stride];
        if (i >= 0 && i < count) out[lane + i * stride] = sum / width;
      }
    }
  }
  return out;
}

/**
 * Find the surface at half by naive surface nets: a vertex a cube of eight grid points that the surface crosses, at the
 * mean of its crossings, and two triangles an edge that it crosses. Positions are (z, y, x) in grid steps.
 */
function surfaceNets(field, [nz, ny, nx]) {
  const level = 0.5;
  const positions = [], indices = [];
  const vertex = new Int32Array(field.length).fill(-1);
  const strides = [ny * nx, nx, 1];
  const corners = [];
  for (let n = 0; n < 8; n++) corners.push([n >> 2, (n >> 1) & 1, n & 1]);
  const edges = [];
  for (let a = 0; a < 8; a++) for (const bit of [1, 2, 4]) if (!(a & bit)) edges.push([a, a | bit]);
  const values = new Float32Array(8);
  for (let z = 0; z < nz - 1; z++) for (let y = 0; y < ny - 1; y++) for (let x = 0; x < nx - 1; x++) {
    const base = (z * ny + y) * nx + x;
    let inside = 0;
    for (let n = 0; n < 8; n++) {
      const [dz, dy, dx] = corners[n];
      values[n] = field[base + dz * strides[0] + dy * strides[1] + dx];
      if (values[n] >= level) inside++;
    }
    if (inside === 0 || inside === 8) continue;
    let count = 0, pz = 0, py = 0, px = 0;
    for (const [a, b] of edges) {
      if ((values[a] >= level) === (values[b] >= level)) continue;
      const t = (level - values[a]) / (values[b] - values[a]);
      pz += corners[a][0] + t * (corners[b][0] - corners[a][0]);
      py += corners[a][1] + t * (corners[b][1] - corners[a][1]);
      px += corners[a][2] + t * (corners[b][2] - corners[a][2]);
      count++;
    }
    vertex[base] = positions.length / 3;
    positions.push(z + pz / count, y + py / count, x + px / count);
  }
  const others = [[1, 2], [2, 0], [0, 1]];
  for (let z = 1; z < nz - 1; z++) for (let y = 1; y < ny - 1; y++) for (let x = 1; x < nx - 1; x++) {
    const base = (z * ny + y) * nx + x;
    for (let axis = 0; axis < 3; axis++) {
      const here = field[base] >= level, there = field[base + strides[axis]] >= level;
      if (here === there) continue;
      const [u, v] = others[axis].map((other) => strides[other]);
      const quad = [vertex[base - u - v], vertex[base - v], vertex[base], vertex[base - u]];
      if (quad.some((n) => n < 0)) continue;
      const [a, b, c, d] = here ? quad : quad.reverse();
      indices.push(a, b, c, a, c, d);
    }
  }
  return { positions, indices: Uint32Array.from(indices) };
}

/** Turn (z, y, x) grid steps, upright, into millimetres around the middle: left to the right, head up, face to us. */
function inSpace(positions, { shape, step_mm: step }) {
  const out = new Float32Array(positions.length);
  for (let i = 0; i < positions.length; i += 3) {
    out[i] = (positions[i + 2] - shape[2] / 2) * step;
    out[i + 1] = (positions[i] - shape[0] / 2) * step;
    out[i + 2] = -(positions[i + 1] - shape[1] / 2) * step;
  }
  return out;
}
