#!/usr/bin/env bash
# Bundle the part of three.js that the report's 3D view needs into nnunet_sam2/report/assets. Needs npm and a network.
set -euo pipefail
three=0.187.0 esbuild=0.25.0
assets="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/nnunet_sam2/report/assets"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
echo '{"name": "bundle", "private": true}' > package.json
npm install --no-audit --no-fund --save-exact "three@$three" "esbuild@$esbuild"
cat > entry.js <<'JS'
export {
  BufferAttribute, BufferGeometry, DirectionalLight, DoubleSide, Group, HemisphereLight, Mesh, MeshStandardMaterial,
  PerspectiveCamera, Scene, Vector3, WebGLRenderer,
} from "three";
export { OrbitControls } from "three/examples/jsm/controls/OrbitControls.js";
JS
npx esbuild entry.js --bundle --minify --format=iife --global-name=THREE --charset=ascii \
    --banner:js="/* three.js $three, MIT licence, https://threejs.org; bundled by scripts/vendor_three.sh */" \
    --outfile="$assets/three.min.js"
cp node_modules/three/LICENSE "$assets/three.LICENSE"
sha256sum "$assets/three.min.js"
