// The first screen: Algorithm 2 on points in two dimensions, with the right lines and with a wrong
// one, from the same noise. It follows ddpm.py; page/test_demo.py compares the two state by state.
// A state is a Float64Array x, y, x, y, …; `wrong` is the name of a mistake, or nothing.
const {sqrt, min, max, abs} = Math, TURN = 3.6 * Math.PI - 0.6;

// The data: 64 narrow Gaussians along a spiral, with the variance V and the means (MX, MY).
const V = 0.02 ** 2, ANGLES = Float64Array.from({length: 64}, (_, k) => 0.6 + k * TURN / 63);
const MX = ANGLES.map(angle => 0.9 * angle / (0.6 + TURN) * Math.cos(angle));
const MY = ANGLES.map(angle => 0.9 * angle / (0.6 + TURN) * Math.sin(angle));

// The network. q(x_t) is a mixture of N(√ᾱ_t m_k, (ᾱ_t V + 1 − ᾱ_t) I), so the best ε_θ is known:
// E[ε | x_t] = √(1 − ᾱ_t) (x_t − √ᾱ_t Σ_k r_k m_k) / (ᾱ_t V + 1 − ᾱ_t), where r_k is the
// probability of the k-th Gaussian given x_t.
function network(x, bar) {
  const eps = new Float64Array(x.length), away = new Float64Array(64);
  const root = sqrt(bar), variance = bar * V + 1 - bar;
  for (let j = 0; j < x.length; j += 2) {
    let nearest = Infinity, sum = 0, mx = 0, my = 0;
    for (let k = 0; k < 64; k++) {
      away[k] = (x[j] - root * MX[k]) ** 2 + (x[j + 1] - root * MY[k]) ** 2;
      nearest = min(nearest, away[k]);
    }
    for (let k = 0; k < 64; k++) {
      const r = Math.exp((nearest - away[k]) / (2 * variance));
      sum += r; mx += r * MX[k]; my += r * MY[k];
    }
    eps[j] = sqrt(1 - bar) * (x[j] - root * mx / sum) / variance;
    eps[j + 1] = sqrt(1 - bar) * (x[j + 1] - root * my / sum) / variance;
  }
  return eps;
}

// The schedule: β_t rises in equal steps, and both ends are multiplied by 1000/T (`make_schedule`).
function makeSchedule(T, rescaled = true) {
  const [first, last] = [1e-4, 0.02].map(beta => rescaled ? min(beta * 1000 / T, 0.999) : beta);
  const s = {T, betas: [0], alphas: [1], bars: [1], times: [0]};
  for (let t = 1; t <= T; t++) {
    s.betas[t] = first + (last - first) * (t - 1) / (T - 1);
    s.alphas[t] = 1 - s.betas[t];
    s.bars[t] = s.bars[t - 1] * s.alphas[t];
    s.times[t] = t;
  }
  return s;
}

// n of the T steps: β'_i = 1 − ᾱ_{τ_i} / ᾱ_{τ_{i−1}} (`respace`).
function respace(s, n, wrong) {
  if (n === s.T) return s;
  const gap = (s.T - 1) / (n - 1), tau = [0];
  for (let i = 0; i < n; i++)
    tau.push(even(i < Math.floor(n / 2) ? 1 + gap * i : s.T - gap * (n - 1 - i)));
  const bars = tau.map(t => s.bars[t]);
  let alphas = bars.map((bar, i) => i ? bar / bars[i - 1] : 1), times = tau;
  if (wrong === "full-beta") alphas = tau.map(t => s.alphas[t]);
  if (wrong === "time") times = tau.map((_, i) => i);
  return {T: n, betas: alphas.map(alpha => 1 - alpha), alphas, bars, times, full: s};
}

function even(number) {  // rounds a half to the even number, as torch does
  const whole = Math.floor(number);
  return number - whole === 0.5 ? whole + whole % 2 : Math.round(number);
}

const betaTilde = (s, t) => (1 - s.bars[t - 1]) / (1 - s.bars[t]) * s.betas[t];

function predictX0(s, x, t, wrong) {
  const tau = s.times[t], bar = (s.full ?? s).bars[tau], eps = network(x, bar);
  if (wrong === "plus") return x.map((x_t, j) => (x_t + sqrt(1 - bar) * eps[j]) / sqrt(bar));
  return x.map((x_t, j) => (x_t - sqrt(1 - bar) * eps[j]) / sqrt(bar));               // Eq. 15
}

function mean(s, x, t, wrong) {  // μ_θ(x_t, t)
  const x0 = predictX0(s, x, t, wrong), beta = s.betas[t], bar = s.bars[t], before = s.bars[t - 1];
  if (wrong === "eq11")
    return x.map((x_t, j) => {
      const eps = (x_t - sqrt(bar) * x0[j]) / sqrt(1 - bar);
      return (x_t - beta / sqrt(1 - bar) * eps) / sqrt(bar);
    });
  const ofX0 = sqrt(before) * beta / (1 - bar);
  const ofX = sqrt(wrong === "eq7" ? bar : s.alphas[t]) * (1 - before) / (1 - bar);
  return x.map((x_t, j) => ofX0 * x0[j] + ofX * x_t);                                 // Eq. 7
}

function* algorithm2(s, variance, x, noise, wrong) {                   // 1: x_T ~ N(0, I)
  yield x;
  const end = wrong === "early" ? 2 : 1;
  for (let t = s.T; t >= end; t--) {                                   // 2: for t = T, …, 1 do
    let z = t > 1 ? noise(t) : x.map(() => 0);                         // 3: z ~ N(0, I), or 0
    if (wrong === "last") z = noise(t);
    if (wrong === "no-z") z = x.map(() => 0);
    const sigma2 = variance === "fixed_large" && t > 1 ? s.betas[t] : betaTilde(s, max(t, 2));
    const sigma = wrong === "square" ? sigma2 : sqrt(sigma2);
    x = mean(s, x, t, wrong).map((mu, j) => mu + sigma * z[j]);        // 4: x_{t−1} = μ_θ + σ_t z
    yield x;
  }
}

function* ddim(s, eta, x, noise, wrong) {  // Song et al. 2021
  yield x;
  for (let t = s.T; t >= 1; t--) {
    const x0 = predictX0(s, x, t, wrong), bar = s.bars[t], before = s.bars[t - 1];
    const z = eta && t > 1 ? noise(t) : x.map(() => 0), sigma2 = eta ** 2 * betaTilde(s, t);
    const rest = max(wrong === "ddim" ? 1 - before : 1 - before - sigma2, 0);
    x = x.map((x_t, j) => {
      const eps = (x_t - sqrt(bar) * x0[j]) / sqrt(1 - bar);           // Eq. 15 inverted
      return sqrt(before) * x0[j] + sqrt(rest) * eps + sqrt(sigma2) * z[j];
    });
    yield x;
  }
}

// All states of a chain, for the choices of the controls.
function chain({T, rescaled, steps, sampler, eta}, x_T, noise, wrong) {
  const s = respace(makeSchedule(T, rescaled), steps, wrong);
  return sampler === "ddim" ? ddim(s, eta, x_T, noise, wrong)
    : algorithm2(s, sampler, x_T, noise, wrong);
}

// Noise as a function of (seed, t, element): MurmurHash3's last step as the hash, then Box–Muller.
function normal(seed, t, length) {
  const mix = n => {
    n = Math.imul(n ^ n >>> 16, 0x85ebca6b);
    n = Math.imul(n ^ n >>> 13, 0xc2b2ae35);
    return (n ^ n >>> 16) >>> 0;
  };
  const key = mix(mix(seed) + t), z = new Float64Array(length);
  for (let j = 0; j < length; j += 2) {
    const radius = sqrt(-2 * Math.log((mix(mix(key + j)) + 1) / 2 ** 32));
    const angle = 2 * Math.PI * mix(mix(key + j + 1)) / 2 ** 32;
    z[j] = radius * Math.cos(angle);
    z[j + 1] = radius * Math.sin(angle);
  }
  return z;
}

const FRAME = 1.3;  // the largest coordinate that a picture shows
const USUAL = {T: 1000, rescaled: true, steps: 100, sampler: "fixed_small", eta: 0.5};

function described(x) {  // what the caption of a picture says of its points
  const far = new Float64Array(x.length / 2).fill(Infinity), n = far.length;
  let squares = 0, out = 0;
  for (let j = 0; j < x.length; j += 2) {
    for (let k = 0; k < 64; k++)
      far[j / 2] = min(far[j / 2], (x[j] - MX[k]) ** 2 + (x[j + 1] - MY[k]) ** 2);
    squares += x[j] ** 2 + x[j + 1] ** 2;
    out += !(abs(x[j]) <= FRAME && abs(x[j + 1]) <= FRAME);  // what is not finite is outside, too
  }
  return out > n / 2 ? `${out} of ${n} points are outside`
    : `median distance to the spiral ${sqrt(far.sort()[n / 2]).toFixed(3)}, `
      + `root mean square ${sqrt(squares / n).toFixed(2)}`;
}

const demo = document.getElementById("demo");
if (demo) {
  const COUNTS = [10, 20, 50, 100, 200, 500, 1000], ETAS = [0, 0.25, 0.5, 0.75, 1], POINTS = 400;
  const chosen = {...USUAL, seed: "1", mistake: "square"};
  const number = n => n.toLocaleString("en");

  // Two pictures, and the time below them.
  const panels = ["right", "wrong"].map(kind => {
    const canvas = make("canvas", {width: 640, height: 640}), caption = make("figcaption");
    canvas.setAttribute("role", "img");
    return {kind, canvas, caption, figure: make("figure", {className: kind}, canvas, caption)};
  });
  const draw = ({kind, canvas, caption}, x, time, said) => {
    const pen = canvas.getContext("2d"), style = getComputedStyle(demo);
    const place = v => 320 + 308 / FRAME * max(-FRAME, min(FRAME, v));  // at the rim: outside
    pen.clearRect(0, 0, 640, 640);
    pen.fillStyle = style.getPropertyValue("--soft");
    MX.forEach((mx, k) => pen.fillRect(place(mx) - 1, place(-MY[k]) - 1, 2, 2));
    pen.fillStyle = style.getPropertyValue(`--${kind}`);
    for (let j = 0; j < x.length; j += 2)
      pen.fillRect(place(x[j]) - 3, place(-x[j + 1]) - 3, 6, 6);
    caption.replaceChildren(make("strong", {}, kind), `: ${said}`);
    canvas.setAttribute("aria-label", `${kind}: ${POINTS} points at ${time}, ${said}`);
  };
  const lazily = states => {  // the state after i steps, computed when it is first asked for
    const found = [];
    return i => {
      for (let next; found.length <= i && !(next = states.next()).done;) found.push(next.value);
      return found[min(i, found.length - 1)];
    };
  };
  const times = make("div");
  let control, play, last = 0;  // the last position of the time
  const load = moving => {
    play?.stop();
    const at = last ? control.get() / last : 1, n = chosen.steps;
    const noise = t => normal(+chosen.seed, t, 2 * POINTS), x_T = noise(0);
    const states = ["", chosen.mistake].map(wrong => lazily(chain(chosen, x_T, noise, wrong)));
    const s = respace(makeSchedule(chosen.T, chosen.rescaled), n);
    last = min(n, 100);
    const done = i => Math.round(i * n / last);  // steps at the i-th position
    const labels = Array.from({length: last + 1}, (_, i) => `t = ${s.times[n - done(i)]}`);
    control = slider("time", labels, moving && !still.matches ? 0 : Math.round(at * last), i => {
      const [right, wrong] = states.map(state => state(done(i)));
      const same = right.every((v, j) => v === wrong[j]);
      draw(panels[0], right, labels[i], described(right));
      draw(panels[1], wrong, labels[i], same ? "the same points" : described(wrong));
    });
    play = player(control, () => last + 1, min(200, 4000 / last));
    control.box.append(play.button);
    times.replaceChildren(control.box);
    if (moving) play.button.click();  // without motion it shows the end
    warning.textContent = s.bars[n] <= 1e-3 ? "" : "make_schedule refuses this schedule: what is "
      + `left of the data at t = T is ᾱ_T = ${s.bars[n].toFixed(2)}, and should be almost nothing.`;
  };

  // The controls.
  let quiet = true;  // no chain is computed while several controls are set
  const change = () => {
    sliders.eta.box.querySelector("input").disabled = chosen.sampler !== "ddim";
    if (!quiet) load(false);
  };
  const sliders = {}, ranged = (name, words, values, said) => {
    sliders[name] = slider(words, values.map(said), values.indexOf(chosen[name]), i => {
      chosen[name] = values[i];
      if (quiet) return;
      quiet = true;  // there are no more steps than T
      if (chosen.steps > chosen.T) sliders[name === "T" ? "steps" : "T"].set(i);
      quiet = false;
      change();
    });
    return sliders[name].box;
  };
  const choice = (name, words, options) => make("fieldset", {className: name},
    make("legend", {}, words), ...options.map(([value, ...label]) => make("label", {},
      make("input", {type: "radio", name, value, checked: value === chosen[name], onchange: () => {
        chosen[name] = value;
        name === "mistake" ? choose() : change();
      }}), make("span", {}, ...label))));
  const scaled = make("input", {type: "checkbox", onchange: () => {
    chosen.rescaled = scaled.checked;
    change();
  }});
  const warning = make("p", {className: "numbers"}), lines = make("div", {className: "lines"});
  lines.setAttribute("role", "status");
  const mistakes = [...demo.querySelectorAll("[data-mistake]")];
  const copied = e => [...e.childNodes].map(node => node.cloneNode(true));
  const variance = kind => copied(demo.querySelector(`[data-variance=${kind}]`));
  const choose = () => {  // a mistake sets the controls on which it depends
    const one = mistakes.find(e => e.dataset.mistake === chosen.mistake);
    Object.assign(chosen, USUAL, JSON.parse(one.dataset.set));
    quiet = true;
    for (const name of ["T", "steps"]) sliders[name].set(COUNTS.indexOf(chosen[name]));
    sliders.eta.set(ETAS.indexOf(chosen.eta));
    for (const radio of demo.querySelectorAll("[name=sampler]"))
      radio.checked = radio.value === chosen.sampler;
    scaled.checked = chosen.rescaled;
    change();
    quiet = false;
    lines.replaceChildren(one, make("p", {className: "numbers"},
      `It sets the controls to ${number(chosen.steps)} of T = ${number(chosen.T)} steps and `,
      ...(chosen.sampler === "ddim" ? [`DDIM with η = ${chosen.eta}.`] : [...variance("fixed_small"), "."])));
    load(true);
  };
  demo.querySelector(".unseen").before(make("div", {className: "live"},
    make("div", {className: "pictures"},
      make("div", {className: "pair"}, ...panels.map(panel => panel.figure)), times),
    choice("mistake", "The wrong line", mistakes.map(e => [
      e.dataset.mistake, ...copied(e.querySelector("a"))])),
    lines,
    make("div", {className: "settings"},
      ranged("steps", "steps", COUNTS, number), ranged("T", "T", COUNTS, number),
      make("label", {}, scaled, make("span", {}, "β multiplied by 1000/T")), warning,
      choice("sampler", "sampler", [
        ["fixed_small", "Algorithm 2, ", ...variance("fixed_small")],
        ["fixed_large", "Algorithm 2, ", ...variance("fixed_large")], ["ddim", "DDIM"]]),
      ranged("eta", "η of DDIM", ETAS, String),
      choice("seed", "noise", [["1", "one draw"], ["2", "another"]]))));
  choose();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change",
    () => control.set(control.get()));
}
