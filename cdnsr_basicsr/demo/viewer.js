// The viewer: two layers of an image, the left one cut off at a handle, and a map over both. Given are element, props,
// watch and server.part by Gradio; props.value is what page.py's `view` returns. At 100 % a pixel of the image is a
// pixel of the screen, and the part that is seen is fetched exactly; the coarse images show through meanwhile.
const find = (selector) => element.querySelector(selector);
const [stage, handle, map] = ['.stage', '.handle', '.map'].map(find);
const layers = { before: find('.before'), after: find('.after') };
const fade = find('.fade input');
let view = null, split = 50, full = false, centre = [0, 0], part = null, asked = 0, size = [1, 1], waiting = 0;

const clamp = (value, low, high) => Math.min(Math.max(value, low), Math.max(low, high));
const ratio = () => window.devicePixelRatio || 1;

function place(image, x, y, width, height) {
  Object.assign(image.style, { left: `${x}px`, top: `${y}px`, width: `${width}px`, height: `${height}px` });
}

function show(image, source) {
  if (!source) image.removeAttribute('src');
  else if (image.getAttribute('src') !== source) image.src = source;
}

function layout() {
  stage.classList.toggle('blank', !view);
  if (!view) {
    stage.style.width = stage.style.height = '';
    return;
  }
  const [width, height] = view.size, room = element.clientWidth, dots = ratio();
  const tall = clamp(window.innerHeight * 0.52, 240, 760);
  const factor = full ? 1 / dots : Math.min(room / width, tall / height);
  size = [Math.min(room, width * factor), Math.min(tall, height * factor)];
  stage.style.width = `${size[0]}px`;
  stage.style.height = `${size[1]}px`;
  // the first pixel that is seen
  const start = [0, 1].map((axis) => {
    const seen = size[axis] * dots, half = seen / 2;
    if (!full) return 0;
    centre[axis] = clamp(centre[axis], half, view.size[axis] - half);
    return Math.round(centre[axis] - half);
  });
  const whole = [-start[0] * factor, -start[1] * factor, width * factor, height * factor];
  for (const layer of Object.values(layers)) {
    place(layer.children[0], ...whole);
    layer.children[1].style.display = full && part ? '' : 'none';
    if (part) {
      const [x, y] = [part.x - start[0], part.y - start[1]];
      place(layer.children[1], x * factor, y * factor, part.width * factor, part.height * factor);
    }
  }
  place(map, ...whole);
  divide();
}

function divide() {
  const alone = !view || !view.after;
  stage.classList.toggle('alone', alone);
  layers.before.style.clipPath = alone ? '' : `inset(0 ${100 - split}% 0 0)`;
  handle.style.left = `${split}%`;
  handle.setAttribute('aria-valuenow', Math.round(split));
  handle.setAttribute('aria-valuetext', `${Math.round(split)} % before, ${Math.round(100 - split)} % after`);
}

async function fetchPart() {
  if (!view || !full) return;
  const mine = ++asked, dots = ratio();
  const [width, height] = size.map((length) => Math.ceil(length * dots * 1.5));
  const [x, y] = [Math.round(centre[0] - width / 2), Math.round(centre[1] - height / 2)];
  const got = await server.part({ token: view.token, x, y, width, height });
  if (mine !== asked || !got) return;
  const ready = [];
  for (const name of ['before', 'after']) {
    if (!got[name]) continue;
    const image = new Image();
    image.src = got[name];
    ready.push(image.decode().catch(() => null));
  }
  await Promise.all(ready);
  if (mine !== asked) return;
  part = got;
  for (const name of ['before', 'after']) show(layers[name].children[1], got[name]);
  layout();
}

function fetchSoon() {
  clearTimeout(waiting);
  waiting = setTimeout(fetchPart, 150);
}

function zoom(wanted, at) {
  full = wanted;
  if (at) centre = at;
  stage.classList.toggle('full', full);
  find('.to-fit').setAttribute('aria-pressed', !full);
  find('.to-full').setAttribute('aria-pressed', full);
  if (full) {
    stage.tabIndex = 0;
    stage.setAttribute('role', 'group');
    stage.setAttribute('aria-label', 'Part of the image at 100 %; arrow keys move it');
  } else {
    for (const name of ['tabindex', 'role', 'aria-label']) stage.removeAttribute(name);
  }
  layout();
  fetchPart();
}

function update() {
  const before = view;
  view = props.value && props.value.size ? props.value : null;
  if (view) {
    if (!before || before.number !== view.number || String(before.size) !== String(view.size)) {
      centre = view.size.map((length) => length / 2);
      part = null;
      for (const layer of Object.values(layers)) show(layer.children[1], '');
    }
    for (const name of ['before', 'after']) {
      show(layers[name].children[0], view[name]);
      layers[name].children[0].alt = view.names[name];
    }
    show(map, view.map);
    find('.left').textContent = view.names.before;
    find('.right').textContent = view.names.after;
    find('.right').hidden = !view.names.after;
    fade.disabled = !view.map;
    find('.fade').classList.toggle('off', !view.map);
    if (full && (!before || before.after !== view.after || before.number !== view.number)) fetchPart();
  }
  layout();
}

function drag(event) {
  const box = stage.getBoundingClientRect();
  const moves = full && event.currentTarget === stage;
  const from = [event.clientX, event.clientY], first = [...centre];
  const target = event.currentTarget;
  const move = (at) => {
    if (moves) {
      centre = [first[0] - (at.clientX - from[0]) * ratio(), first[1] - (at.clientY - from[1]) * ratio()];
      layout();
    } else {
      split = clamp(100 * (at.clientX - box.left) / box.width, 0, 100);
      divide();
    }
  };
  const end = () => {
    target.removeEventListener('pointermove', move);
    for (const name of ['pointerup', 'pointercancel']) target.removeEventListener(name, end);
    if (moves) fetchPart();
  };
  if (event.button || !view || (!moves && !view.after)) return;
  event.stopPropagation();
  target.setPointerCapture(event.pointerId);
  target.addEventListener('pointermove', move);
  for (const name of ['pointerup', 'pointercancel']) target.addEventListener(name, end);
  if (!moves) move(event);
}

handle.addEventListener('pointerdown', drag);
stage.addEventListener('pointerdown', drag);
handle.addEventListener('keydown', (event) => {
  const steps = { ArrowLeft: -2, ArrowDown: -2, ArrowRight: 2, ArrowUp: 2, PageDown: -10, PageUp: 10, Home: -100, End: 100 };
  if (!(event.key in steps)) return;
  event.preventDefault();
  event.stopPropagation();
  split = clamp(split + steps[event.key], 0, 100);
  divide();
});
stage.addEventListener('keydown', (event) => {
  const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (!full || !(event.key in ways)) return;
  event.preventDefault();
  centre = centre.map((value, axis) => value + ways[event.key][axis] * 64);
  layout();
  fetchSoon();
});
stage.addEventListener('dblclick', (event) => {
  if (!view || event.target.closest('.handle')) return;
  const box = stage.getBoundingClientRect();
  zoom(!full, [(event.clientX - box.left) / box.width * view.size[0], (event.clientY - box.top) / box.height * view.size[1]]);
});
find('.to-fit').addEventListener('click', () => zoom(false));
find('.to-full').addEventListener('click', () => zoom(true));
fade.addEventListener('input', () => { map.style.opacity = fade.value / 100; });
map.style.opacity = fade.value / 100;
new ResizeObserver(() => { layout(); fetchSoon(); }).observe(element);
watch('value', update);
update();
