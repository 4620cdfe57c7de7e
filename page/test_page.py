"""The page of page/page.py in two browsers: `pytest --noconftest page/test_page.py`, after
`pip install -r page/requirements.txt`, with Chromium (or Chrome) and Firefox on the machine.

Chromium is driven by Playwright. Firefox is spoken to in WebDriver BiDi, its own protocol, because
Playwright needs a Firefox of its own.
"""
import ast
import base64
import contextlib
import importlib.resources
import io
import itertools
import json
import re
import shutil
import subprocess
import time

import pytest
from playwright.sync_api import sync_playwright
import torch
from pypdf import PdfReader
from websockets.sync.client import connect

import page
import ddpm
from figures import Spiral, with_lines

@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The page as a file, and the seconds of a processor that it took."""
    path = tmp_path_factory.mktemp("page") / "index.html"
    started = time.process_time()
    assert page.main(["--out", str(path)]) == 0
    return path, time.process_time() - started

def program_of(*names: str) -> str:
    """A browser on this machine; its tests are skipped if there is none."""
    found = next(filter(None, map(shutil.which, names)), None)
    return found or pytest.skip(f"no {' or '.join(names)} on this machine")

class Chromium:
    """The page in Chromium: a window of some size, in light or dark."""

    def __init__(self, playwright, path, width: int, dark: bool):
        program = program_of("chromium", "google-chrome")
        self.browser = playwright.chromium.launch(executable_path=program)
        self.page = self.browser.new_page(viewport={"width": width, "height": 800},
                                          color_scheme="dark" if dark else "light")
        self.asked: list[str] = []
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: said.type == "error" and self.errors.append(said.text))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def run(self, script: str):
        return self.page.evaluate(f"async () => {{ {script} }}")

    def press(self, key: str) -> None:
        self.page.keyboard.press({" ": "Space"}.get(key, key))

    def printed(self) -> bytes:
        return self.page.pdf()

    def close(self) -> None:
        self.browser.close()

class Firefox:
    """The same in Firefox."""

    def __init__(self, folder, path, width: int, dark: bool):
        profile = folder / f"profile-{width}-{dark}"
        profile.mkdir()
        (profile / "user.js").write_text(
            f'user_pref("layout.css.prefers-color-scheme.content-override", {0 if dark else 1});\n')
        program = program_of("firefox-esr", "firefox")
        with open(profile / "log", "w") as log:
            self.process = subprocess.Popen([program, "--headless", "--no-remote", "--profile", profile,
                                             "--remote-debugging-port", "0"], stderr=log)
        found, until = None, time.monotonic() + 60
        while not found and time.monotonic() < until:
            time.sleep(0.1)
            found = re.search(r"listening on (ws://\S+)", (profile / "log").read_text())
        self.opened = contextlib.ExitStack()
        self.socket = self.opened.enter_context(connect(found[1] + "/session", max_size=None))
        self.numbers, self.asked, self.errors = itertools.count(1), [], []
        self.call("session.new", capabilities={})
        self.call("session.subscribe", events=["network.beforeRequestSent", "log.entryAdded"])
        self.context = self.call("browsingContext.create", type="window")["context"]
        self.call("browsingContext.setViewport", context=self.context,
                  viewport={"width": width, "height": 800})
        self.call("browsingContext.navigate", context=self.context, url=path.as_uri(), wait="complete")
        self.call("browsingContext.activate", context=self.context)
        self.run("while (!document.hasFocus()) await new Promise(done => setTimeout(done, 50));")

    def call(self, method: str, **params):
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            answer = json.loads(self.socket.recv(timeout=300))
            if answer.get("method") == "network.beforeRequestSent":
                self.asked.append(answer["params"]["request"]["url"])
            if answer.get("method") == "log.entryAdded" and answer["params"]["level"] == "error":
                self.errors.append(answer["params"]["text"])
            if answer.get("id") == number:
                assert answer["type"] == "success", answer
                return answer["result"]

    def run(self, script: str):
        script = f"(async () => JSON.stringify(await (async () => {{ {script} }})() ?? null))()"
        answer = self.call("script.evaluate", expression=script, awaitPromise=True,
                           target={"context": self.context})
        assert answer["type"] == "success", answer
        return json.loads(answer["result"]["value"])

    def press(self, key: str) -> None:
        value = {"Enter": "\ue006", "ArrowLeft": "\ue012", "ArrowRight": "\ue014"}.get(key, key)
        self.call("input.performActions", context=self.context, actions=[
            {"type": "key", "id": "keys", "actions": [{"type": "keyDown", "value": value},
                                                      {"type": "keyUp", "value": value}]}])

    def printed(self) -> bytes:
        return base64.b64decode(self.call("browsingContext.print", context=self.context)["data"])

    def close(self) -> None:
        self.opened.close()
        self.process.terminate()
        self.process.wait()

@pytest.fixture(scope="session")
def playwright():
    with sync_playwright() as found:
        yield found

@pytest.fixture(scope="module", params=["chromium", "firefox"])
def window(request, built, playwright, tmp_path_factory):
    """Opens the page at some width, in light or dark; each window once for all tests."""
    opened, folder = {}, tmp_path_factory.mktemp("firefox")

    def open_at(width: int = 1400, dark: bool = False):
        if (width, dark) not in opened:
            opened[width, dark] = (Chromium(playwright, built[0], width, dark)
                                   if request.param == "chromium" else
                                   Firefox(folder, built[0], width, dark))
        return opened[width, dark]
    yield open_at
    for one in opened.values():
        one.close()

FOLDS = "for (const d of document.querySelectorAll('details:not(.derivation)')) d.open = %s;"

def test_size_and_time(built):
    """Under 1.6 MB with its pictures, built in under ten seconds, with scripts of 150 and 300 lines."""
    path, seconds = built
    assert path.stat().st_size < 1_600_000 and seconds < 10
    assert path.read_text(encoding="utf-8").count("<script") == 1
    assert len(page.read("page/page.js").splitlines()) <= 150
    assert len(page.read("page/demo.js").splitlines()) <= 300

def test_nothing_is_missing(built):
    """Every function and class, every equation, every mistake that is listed, and a test for each."""
    text = built[0].read_text(encoding="utf-8")
    for file, prefix in (("ddpm.py", ""), ("unet.py", "unet-")):
        for node in ast.parse(page.read(file)).body:
            if hasattr(node, "name"):
                assert f"<section class=unit id={prefix}{node.name}>" in text, node.name
    assert "<section class=unit id=train-training_step>" in text
    labels = re.findall(r'<span class="?(?:label|number)"?>(.*?)</span>|<h4.*?</a>(.*?)</h4>', text)
    labels = ["".join(both) for both in labels]
    assert set().union(*map(page.numbers, labels)) >= set(range(1, 17))
    collected = page.Page()
    for name, (_, test, _, controls) in collected.mistakes.items():
        if controls:
            assert text.count(f'id="mistake-{page.slug(name)}"') == 1, name
    for _, _, _, tests in collected.rows:
        for test in re.findall(r"`(test_\w+)`", tests):
            assert f'id="{test}"' in text or collected.tests[test][0] != "test_ddpm.py", test

def test_the_code_is_all_there(built):
    """Put together again, the code of the page is that of ddpm.py without docstrings and comments."""
    text = built[0].read_text(encoding="utf-8").split('id="train-py"')[0]
    shown = "\n".join(page.html.unescape(re.sub("<.*?>", "", block)) for block in
                      re.findall(r'(?s)<pre class="code">(.*?)</pre>', text))

    def bare(source: str) -> list[str]:
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(node):
                node.body = node.body[1:] or [ast.Pass()]
        return sorted(ast.unparse(node) for node in tree.body)
    assert bare(shown) == bare(page.read("ddpm.py"))

def part(text: str, address: str) -> str:
    """A chapter of the page: from its heading to the next one of the same level."""
    return text.split(f'<h2 id="{address}">')[1].split("<h2 id=")[0]

def test_addresses_are_ascii(built):
    """Every address within the page can be typed, and reads as what it names."""
    text = built[0].read_text(encoding="utf-8")
    names = re.findall(r' id="?([^\s">]+)', text)
    assert len(names) > 300 and all(re.fullmatch(r"[\w.-]+", name, re.ASCII) for name in names)
    assert "sym-bar-alpha-t" in names and "mistake-sigma-t2-instead-of-sigma-t" in names
    assert page.slug("ᾱ_0 ≠ 1") == "alpha-bar-0-1" and page.slug("Hernández–Lobato") == "hernandez-lobato"

def test_every_function_says_what_it_is_for(built):
    """Above each function a sentence, before its formula; none of a function that is not shown."""
    text = built[0].read_text(encoding="utf-8")
    why, units = page.Page().why, re.findall(r"<section class=unit id=([\w.-]+)>(.*?)</section>", text, re.S)
    assert {name for name, _ in units} == set(why) and len(why) > 60
    for name, inside in units:
        said = inside.split("<p class=why>")[1]
        assert 'class="formula"' not in inside.split("<p class=why>")[0], name
        assert len(re.sub("<.*?>", "", said.split("</p>")[0])) > 30, name
    assert all(said[0].isupper() and said.endswith(".") for said in why.values())
    assert len(set(why.values())) == len(why)

def test_ten_questions(built):
    """Each is answered in a few sentences, with a number or a picture, and leads to an equation or a function."""
    found = part(built[0].read_text(encoding="utf-8"), "questions").split("<h3 ")[1:]
    assert len(found) == 10
    for one, words in zip(found, ("SNR 9,999", "15.1", "13.51", "1.46", "0.94", "3.66", "4.02", "1.78", "0.0191", "55.8")):
        answer = one.split("</h3>")[1]
        sentences = len(re.findall(r"[.:?)] |\.<", re.sub("<math>.*?</math>|</?[abe].*?>", "x", answer)))
        assert 3 <= sentences <= 14 and words.split()[-1] in answer, (words, sentences)
        assert re.search('href="#(?!question|runs)', answer), words
    assert sum("<svg" in one for one in found) >= 6
    assert not re.search(r"picture\d+here|&lt;img|<!--", "".join(found))

def test_symptoms_come_second_and_in_peoples_words(built):
    """The second entry of the contents; every word that people type is in the table."""
    text = built[0].read_text(encoding="utf-8")
    entries = re.findall(r'<li><a href="#([\w-]+)"', text.split("<nav ")[1].split("</nav>")[0])
    assert entries[:3] == ["questions", "symptoms", "exercises"]
    inside = part(text, "symptoms")
    assert "My samples look wrong" in inside and len(text.split('<h2 id="symptoms">')[0]) < 0.6 * len(text)
    said = re.sub("<.*?>", "", inside).lower()
    for word in ("grey", "gray", "blurry", "too dark", "too bright", "noisy", "noise remains", "checkerboard", "washed out",
                 "mode collapse", "one colour", "nan", "loss does not fall", "fid stuck", "black", "specks"):
        assert word in said, word
    rows = page.table("Symptoms")
    for what, causes, met in rows:
        other = [name for name in causes.split("; ") if name not in page.Page().mistakes]
        assert met or not other or re.search(r"\d|here", causes), what  # a cause that was not run has a thread, or a number
    assert re.search(r"# My samples look wrong\n\n.*\n\n## Symptoms", page.read("docs/mistakes.md"))

def test_exercises(built):
    """Ten times four lines: those of the program but for one, which the folded answer names."""
    found = part(built[0].read_text(encoding="utf-8"), "exercises").split("<section>")[1:]
    assert len(found) == len(set(page.EXERCISES)) == 10
    places, mistakes = [], page.Page().mistakes
    for name, one in zip(page.EXERCISES, found):
        listing = page.html.unescape(re.sub("<.*?>", "", re.search(r'(?s)<pre class="code four">(.*?)</pre>', one)[1]))
        lines = [re.fullmatch(r"\d  (.*)", line)[1].strip() for line in listing.split("\n")]
        program = {line.strip() for line in page.read(mistakes[name][0]).splitlines()}
        wrong, = (i for i, line in enumerate(lines, 1) if line not in program)
        answer = re.search(r"(?s)<details><summary>.*?</details>", one)[0]
        assert len(lines) == 4 and f"<p>Line {wrong}: " in answer and f'href="#mistake-{page.slug(name)}"' in answer
        assert page.prose(name) not in one.replace(answer, "") and one.count("<use") == 2, name
        places.append(wrong)
    assert set(places) == {1, 2, 3, 4}

def test_history(built):
    """What came before and after, each with its address."""
    inside = part(built[0].read_text(encoding="utf-8"), "history")
    for year, address in ((2015, "1503.03585"), (2019, "1907.05600"), (2020, "2006.11239"), (2020, "2010.02502"),
                          (2020, "2011.13456"), (2021, "2102.09672"), (2021, "2105.05233"), (2021, "2112.10752"),
                          (2022, "2202.00512"), (2022, "2206.00364")):
        assert re.search(rf"<tr>\s*<td>{year}</td>\s*<td>[^\n]*https://arxiv.org/abs/{address}\"", inside), address

TEXTS = ["PAPER.md", *(f"docs/{name}.md" for name in ("mistakes", "questions", "history"))]

def faults(text: str) -> list[str]:
    """Formulas that GitHub does not typeset: it wants white space before $, and white space or a mark after it."""
    found = []
    text = re.sub(r"(?ms)^```.*?^```|^\$\$.*?\$\$$|`[^`\n]*`", "", text)
    for line in text.splitlines():
        pieces = re.split(r"\$", line)
        found += [line] if len(pieces) % 2 == 0 else []
        for before, inside, after in zip(pieces[::2], pieces[1::2], pieces[2::2]):
            if before and not before[-1].isspace() or inside != inside.strip() or not inside or not re.match(r"[\s.,;:!?)]|$", after):
                found.append(f"{before[-9:]}${inside}${after[:9]}")
    return found

@pytest.mark.parametrize("name", TEXTS)
def test_formulas_as_github_reads_them(name):
    """Each formula stands free, and the tables of PAPER.md have no symbol outside of a formula."""
    assert faults("&emsp;$x$") and faults("($x$") and faults("$x $") and faults("$x$<br>") and faults("$x") and not faults("a $x$, `$b` $y$.")
    assert faults(page.read(name)) == []
    if name == "PAPER.md":
        rows = re.findall(r"(?m)^\|.*", page.read(name))
        plain = [re.sub(r"\$[^$]*\$|`[^`]*`", "", row) for row in rows]
        assert len(rows) > 80 and not [row for row in plain if re.search(r"_|[α-ωΑ-Ω√²³∞]|\bt\b", row)]
        assert len(page.read(name).splitlines()) < 215

GITHUB = """body { margin: 0; width: 830px; font: 16px/1.5 "DejaVu Sans", sans-serif; } .wide { overflow: visible; }
table { display: block; width: max-content; max-width: 100%; overflow: auto; border-collapse: collapse; }
th, td { padding: 6px 13px; border: 1px solid; }
code { font: 85% "DejaVu Sans Mono", monospace; padding: 0.2em 0.4em; white-space: break-spaces; }"""

@pytest.mark.parametrize("name", TEXTS)
def test_tables_fit_where_github_shows_them(name, playwright):
    """No table is wider than the 830 pixels of a repository's page."""
    browser = playwright.chromium.launch(executable_path=program_of("chromium", "google-chrome"))
    one = browser.new_page()
    text = re.sub(r"\\[bB]ig(?![a-zA-Z])|\\[bB]ig(?=\\[lr]Vert)", "", page.read(name))  # a formula in parts
    body = page.markdown(text).replace("<wbr>", "").replace("&lt;br&gt;", "<br>")
    one.set_content(f"<style>{GITHUB}</style>{body}")
    wide = one.evaluate("[...document.querySelectorAll('table')].filter(t => t.scrollWidth > t.clientWidth).map(t => t.innerText.slice(0, 80))")
    browser.close()
    assert wide == []

WIDTHS = [360, 700, 1000, 1380, 1700]

@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("unfolded", [False, True])
def test_no_sideways_scroll(window, width, unfolded):
    """Nothing sticks out of the window, but within boxes that scroll by themselves."""
    one = window(width)
    out = one.run(FOLDS % str(unfolded).lower() + """
        const out = [], w = document.documentElement.clientWidth;
        for (const e of document.querySelectorAll('body *')) {
            const r = e.getBoundingClientRect();
            let p = e.parentElement;
            while (p && getComputedStyle(p).overflowX === 'visible') p = p.parentElement;
            if (r.width && r.right > w + 1 && (!p || p === document.documentElement))
                out.push(e.tagName + '.' + e.className + ' ' + e.textContent.slice(0, 60));
        }
        return [document.documentElement.scrollWidth - w, out];""")
    one.run(FOLDS % "false")
    assert out == [0, []], out

def test_links_and_names(window):
    """Names are unique, every link leads somewhere, and every section has one to itself."""
    names, links, sections = window().run("""
        return [[...document.querySelectorAll('[id]')].map(e => e.id),
                [...document.querySelectorAll('a')].map(e => e.getAttribute('href')),
                [...document.querySelectorAll('h2, h3, h4, h5')].map(
                    e => e.querySelector('a.anchor') ? '' : e.textContent).filter(x => x)];""")
    assert len(names) == len(set(names)) and not sections
    for link in links:
        assert link.startswith("https://") or link.startswith("#") and link[1:] in names, link

def test_a_link_into_a_fold_opens_it(window):
    """The address of a theorem shows the theorem."""
    assert window().run("""
        const inside = document.querySelector('.theorem .inside');
        location.hash = inside.id;
        await new Promise(done => setTimeout(done, 300));
        const open = inside.parentElement.open;
        inside.parentElement.open = false;
        return open;""")

def test_formulas(window):
    """No TeX is left, the font is there, and no formula is empty, huge or cut."""
    left, font, odd = window(700).run(FOLDS % "true" + """
        await document.fonts.ready;
        const text = document.body.cloneNode(true), odd = [];
        for (const e of text.querySelectorAll('pre, code, script')) e.remove();
        for (const e of document.querySelectorAll('main math')) {
            const r = e.getBoundingClientRect();
            if (r.width < 3 || r.height < 5 || r.height > 140 || r.width > 900)
                odd.push([e.textContent, r.width, r.height]);
        }
        return [text.textContent.match(/\\\\[a-zA-Z]+|\\$|_\\{|\\^\\{/g), document.fonts.check(
                '16px "DDPM Math"', '𝒩'), odd];""")
    assert (left, font, odd) == (None, True, [])

def test_accents_stand_over_their_letters(window):
    """The bar of ᾱ_t and the hat of x̂_0 are in the middle, also in links and tables."""
    seen, away = window(820).run("""
        await document.fonts.ready;
        await new Promise(done => setTimeout(done, 300));
        const middle = e => { const r = e.getBoundingClientRect(); return r.x + r.width / 2; };
        const seen = [...document.querySelectorAll('mover')].filter(e => e.getClientRects().length);
        return [seen.length, seen.filter(e => Math.abs(middle(e.children[0]) - middle(e.children[1])) > 2.5).map(
            e => e.closest('p, li, td, th, div').textContent.slice(0, 60))];""")
    assert seen > 100 and away == []

def test_subscripts_are_smaller(window):
    """Formulas are laid out as formulas: the index of x_t is smaller than x, and lower."""
    base, index = window().run("""
        const one = document.querySelector('.unit msub');
        return [...one.children].map(e => { const r = e.getBoundingClientRect();
            return [parseFloat(getComputedStyle(e).fontSize), r.bottom]; });""")
    assert index[0] < 0.85 * base[0] and index[1] > base[1]

CONTRAST = """
    const split = c => c.match(/[\\d.]+/g).map(Number);
    const light = c => { const [r, g, b] = split(c).map(x => { x /= 255;
        return x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4; });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const low = {};
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
        if (!walk.currentNode.textContent.trim()) continue;
        const e = walk.currentNode.parentElement;
        let p = e, ground = 'rgb(255, 255, 255)';
        for (; p; p = p.parentElement) {
            const b = getComputedStyle(p).backgroundColor;
            if (split(b)[3] !== 0) { ground = b; break; }
        }
        const a = light(getComputedStyle(e).color), b = light(ground);
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < 4.5) low[e.tagName + '.' + e.className] = ratio;
    }
    return [low, light(getComputedStyle(document.body).backgroundColor)];"""

@pytest.mark.parametrize("dark", [False, True])
def test_contrast(window, dark):
    """All text has a contrast of 4.5 or more to its ground, in both themes."""
    low, ground = window(1400, dark).run(FOLDS % "true" + CONTRAST)
    assert low == {} and (ground < 0.1) == dark

def test_nothing_is_fetched(window):
    """No request leaves the page: all that it needs is in it."""
    one = window()
    assert one.run("return performance.getEntriesByType('resource').map(e => e.name)"
                   ".filter(name => !name.startsWith('data:'))") == []
    assert all(url.startswith(("file:", "data:")) for url in one.asked)
    assert one.asked or isinstance(one, Firefox)  # which does not report its own file

def test_folds_open_from_the_keyboard(window):
    """Enter opens the fold that has the focus, and the space bar closes it."""
    one = window()
    one.run(FOLDS % "false")
    assert one.run("const s = document.querySelector('.proofs > summary'); s.focus();"
                   "return document.activeElement === s;")
    state = "return document.querySelector('.proofs').open"
    assert not one.run(state)
    one.press("Enter")
    assert one.run(state)
    one.press(" ")
    assert not one.run(state)

def test_print_is_the_mathematics(window):
    """On paper there are the equations, derivations, boxes and code, without tests and mistakes."""
    one = window()
    one.run(FOLDS % "false")
    pages = PdfReader(io.BytesIO(one.printed())).pages
    text = re.sub(r"\s", "", "".join(part.extract_text() for part in pages))
    assert len(pages) < 30
    for said in ("Bayes’rule", "Algorithm4", "defp_sample_loop", "Derivation:Eq.16", "convex"):
        assert said.replace("’", "'") in text.replace("’", "'"), said
    assert "deftest_" not in text and "Easymistake" not in text
    assert "andwiththreewrongones" in text and "Thewrongline" not in text  # of the first screen

@pytest.mark.parametrize("width, unfolded", [(360, "true"), (1000, "false"), (1400, "true")])
def test_axe(window, width, unfolded):
    """axe finds no fault: on a telephone, with the contents at the side, and in two columns."""
    one = window(width)
    axe = (importlib.resources.files("axe_playwright_python") / "axe.min.js").read_text()
    found = one.run(FOLDS % unfolded + axe + """;
        const found = await axe.run(document, {rules: {'label-content-name-mismatch': {enabled: true}}});
        return found.violations.map(v => [v.id, v.nodes.length, v.nodes[0].html.slice(0, 200)]);""")
    one.run(FOLDS % "false")
    assert found == [], found

@pytest.mark.parametrize("width", [1380, 1700])
def test_code_and_formulas_are_whole(window, width):
    """In two columns no line of code is broken, and no displayed formula needs to be scrolled."""
    broken, cut = window(width).run("""
        await document.fonts.ready;
        const broken = [], cut = [];
        for (const e of document.querySelectorAll('.unit > .done > pre.code')) {
            e.style.whiteSpace = 'pre';
            if (e.scrollWidth > e.clientWidth) broken.push(e.textContent.slice(0, 60));
            e.style.whiteSpace = '';
        }
        for (const e of document.querySelectorAll('.formula')) {
            const edge = e.getBoundingClientRect().right;
            for (const m of e.querySelectorAll('math'))
                if (m.getBoundingClientRect().right > edge + 1) cut.push(m.textContent);
        }
        return [broken, cut];""")
    assert broken == [] and cut == [], cut

def test_the_sliders(window):
    """The arrow keys move the time of the garments and the bytes of the files."""
    one = window()
    for number in range(one.run("return document.querySelectorAll('figure[data-frames]').length")):
        state = f"""const f = document.querySelectorAll('figure[data-frames]')[{number}];
            const range = f.querySelector('input');"""
        look = state + """return [+range.value, f.querySelector('output').textContent,
            [...f.querySelectorAll('.frame')].map(e => e.getAttribute('viewBox').split(' ')[0])];"""
        one.run(state + "range.value = 2; range.dispatchEvent(new Event('input')); range.focus();")
        value, said, places = one.run(look)
        assert value == 2 and len(places) >= 4 and set(places) == {"32"}
        one.press("ArrowRight")
        value, other, places = one.run(look)
        assert value == 3 and set(places) == {"48"} and other != said

def test_the_filter_of_the_symptoms(window):
    """Rows that lack one of the words are hidden, in any order and case; without words all are there."""
    one = window()
    look = """const filter = document.getElementById('filter'); filter.value = %r;
        filter.dispatchEvent(new Event('input'));
        return [[...document.querySelectorAll('.symptoms tbody tr')].filter(e => e.offsetHeight).map(
            e => e.cells[0].textContent), filter.parentElement.querySelector('output').textContent];"""
    every, said = one.run(look % "")
    assert len(every) > 20 and said == ""
    for words, wanted in (("gray", "uniform grey (gray)"), ("Remains NOISE", "noise remains"), ("NaN loss", "the loss is nan"),
                          ("blurry", "blurry"), ("mode collapse", "all samples are alike")):
        found, said = one.run(look % words)
        assert any(row.startswith(wanted) for row in found) and len(found) < 6 and said == f"{len(found)} of {len(every)}", words
    assert one.run(look % "nobody writes this") == [[], f"0 of {len(every)}"]
    assert one.run(look % "")[0] == every

def test_the_switches(window):
    """Enter puts the wrong picture in the place of the right one, and takes it away again."""
    one = window()
    look = """const b = document.querySelector('.mistake.shown .switch'); b.focus();
        return [b.getAttribute('aria-pressed'), ...[...b.parentElement.querySelectorAll('use')].map(
            e => e.getAttribute('href'))];"""
    off, right, wrong = one.run(look)
    one.press("Enter")
    assert (off, right != wrong) == ("false", True) and one.run(look) == ["true", wrong, wrong]
    one.press("Enter")
    assert one.run(look) == ["false", right, wrong]
    assert one.run("return document.querySelectorAll('.switch').length") > 20

def test_symbols_explain_themselves(window):
    """A symbol within a formula shows its line, and symbols in the text are links to it."""
    shown, links = window().run("""
        const symbol = [...document.querySelectorAll('.formula msub')].find(e => e.textContent === 'εθ');
        symbol.dispatchEvent(new PointerEvent('pointerover', {bubbles: true}));
        const shown = document.querySelector('.tip').textContent;
        document.body.dispatchEvent(new PointerEvent('pointerover', {bubbles: true}));
        const known = new Set([...document.querySelectorAll('a.sym')].map(e => e.hash));
        return [shown, [...document.querySelectorAll('dt[id^=sym]')].map(e => '#' + e.id).filter(
            x => !known.has(x))];""")
    assert shown.startswith("the network") and len(links) <= 1

def test_whole_without_the_script(built, playwright):
    """Without JavaScript all pictures are there, and no control that would do nothing."""
    browser = playwright.chromium.launch(executable_path=program_of("chromium", "google-chrome"))
    context = browser.new_context(java_script_enabled=False)
    one = context.new_page()
    one.goto(built[0].as_uri())
    assert one.locator("input, .switch, canvas").count() == 0
    assert one.locator("#demo .still svg:visible").count() == 4
    pictures = [e for e in one.locator("figure svg[role=img]").all() if e.is_visible()]
    assert len(pictures) > 25
    assert all(row.is_visible() for row in one.locator(".symptoms tr").all())
    one.locator("#exercises ~ .cards summary").first.click()
    assert one.get_by_text("What else was seen").first.is_visible()
    browser.close()

# === The first screen: page/demo.js beside ddpm.py ================================================

def chosen(one, **changes) -> dict:
    """The settings of the controls when nothing else is said, with changes."""
    return {**one.run("return USUAL;"), **changes}

def noise(steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x_T of twelve points, and their z for t = 0 … steps."""
    g = torch.Generator().manual_seed(steps)
    x_T, *z = torch.randn(steps + 2, 12, 2, generator=g, dtype=torch.float64)
    return x_T, torch.stack(z)

def in_browser(one, choices: dict, wrong: str = "") -> torch.Tensor:
    """All states of the demo's chain."""
    x_T, z = (x.flatten(-2).tolist() for x in noise(choices["steps"]))
    found = one.run(f"""const z = {json.dumps(z)};
        const states = chain({json.dumps(choices)}, Float64Array.from({json.dumps(x_T)}),
                             t => Float64Array.from(z[t]), '{wrong}');
        return [...states].map(x => [...x]);""")
    return torch.tensor(found, dtype=torch.float64).unflatten(1, (12, 2))

def in_python(choices: dict, replacements: list) -> torch.Tensor:
    """The same by ddpm.py, perhaps with wrong lines."""
    program, (x_T, z), T = with_lines(replacements), noise(choices["steps"]), choices["T"]
    s = program.make_schedule(T) if choices["rescaled"] else program.schedule_from_betas(
        torch.linspace(1e-4, 0.02, T, dtype=torch.float64))
    ddim = choices["sampler"] == "ddim"
    model = program.Model(program.respace(s, choices["steps"]), Spiral(s), clip=False,
                          variance="fixed_small" if ddim else choices["sampler"])
    states = program.ddim_loop(model, x_T, lambda t: z[t], eta=choices["eta"]) if ddim else \
        program.p_sample_loop(model, x_T, lambda t: z[t])
    return torch.stack([state.x_t for state in states])

@pytest.mark.parametrize("changes", [
    {"steps": 1000}, {"steps": 1000, "sampler": "fixed_large"}, {}, {"sampler": "fixed_large"},
    {"steps": 10}, {"T": 50, "steps": 50}, {"T": 200, "steps": 20}, {"T": 10, "steps": 10},
    {"T": 100, "rescaled": False}, {"T": 200, "steps": 50, "rescaled": False},
    {"sampler": "ddim", "eta": 0}, {"sampler": "ddim"}, {"sampler": "ddim", "eta": 1, "steps": 1000}], ids=str)
def test_the_demo_is_ddpm(window, changes):
    """From the same x_T and z every state is that of ddpm.py: respaced and full, Algorithm 2 and DDIM."""
    one = window()
    choices = chosen(one, **changes)
    found, right = in_browser(one, choices), in_python(choices, [])
    assert found.shape == right.shape == (choices["steps"] + 1, 12, 2)
    torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-6)

@pytest.mark.parametrize("key", page.DEMO)
def test_the_demos_mistakes_are_those_of_the_lines(window, key):
    """With each mistake every state is that of ddpm.py with the wrong line that the page shows."""
    name, place, replacements, changes, _ = page.DEMO[key]
    one = window()
    choices = chosen(one, **changes)
    found, right = in_browser(one, choices, key), in_browser(one, choices)
    wrong = in_python(choices, replacements if place else page.Page().mistakes[name][2])
    assert found.shape == wrong.shape
    torch.testing.assert_close(found, wrong, rtol=1e-6, atol=1e-6)
    assert (found[-1] - right[-1]).square().mean().sqrt() > 0.02  # which is the width of the Gaussians

def test_the_demo_takes_the_times_of_respace(window):
    """Every number of steps that respace knows has its times, also where a half is rounded."""
    found = window().run("""const s = makeSchedule(1000), times = [];
        for (let n = 2; n < 1000; n++) times.push(respace(s, n).times);
        return times;""")
    s = ddpm.make_schedule()
    assert found == [ddpm.respace(s, n).times.tolist() for n in range(2, 1000)]

def test_the_demos_noise_is_normal(window):
    """800,000 numbers: mean, variance, fourth moment, and nothing between elements, times and seeds."""
    mean, variance, fourth, *between = window().run("""
        const moments = [0, 0, 0, 0, 0, 0], n = 800000;
        for (let t = 0; t < 1000; t++) {
            const z = normal(1, t, 800), later = normal(1, t + 1, 800), other = normal(2, t, 800);
            z.forEach((v, j) => {
                [v, v ** 2, v ** 4, v * z[(j + 1) % 800], v * later[j], v * other[j]].forEach(
                    (term, k) => { moments[k] += term / n; });
            });
        }
        return moments;""")
    assert abs(mean) < 0.005 and abs(variance - 1) < 0.008 and abs(fourth - 3) < 0.05  # 4.5 deviations
    assert all(abs(value) < 0.005 for value in between), between

LOOK = """const [right, wrong] = document.querySelectorAll('#demo canvas'), said = document.querySelector('#demo output');
    return [said.textContent, right.getAttribute('aria-label'), right.toDataURL(), wrong.toDataURL()];"""
END = """for (let i = 0; i < 600; i++) {
        if (document.querySelector('#demo output').textContent === 't = 0') break;
        await new Promise(done => setTimeout(done, 50));
    }""" + LOOK

def test_the_demo_moves_by_itself_once(window):
    """When the page has been opened, two pictures go from noise to points, and stop there."""
    one = window(820)
    first = one.run(LOOK)
    last = one.run(END)
    assert last[0] == "t = 0" and last[2] != last[3]
    assert first[0] == "t = 0" or first[2] != last[2]  # on a slow machine it has ended by now
    assert last[1].startswith("right: 400 points at t = 0, median distance to the spiral 0.0")
    time.sleep(0.5)
    assert one.run(LOOK) == last
    assert one.run("return document.querySelector('#demo button').textContent;") == "Play"

def test_every_mistake_of_the_demo(window):
    """Each choice shows its own line, leads to its place, sets its controls, and draws its own points."""
    one, seen = window(), set()
    for key, (name, place, _, changes, _) in page.DEMO.items():
        one.run(f"""location.hash = '';
            const words = document.querySelector('#demo input[value={key}]').nextElementSibling;
            const at = words.querySelector('mi') ?? words;  // a symbol, which elsewhere is a link
            at.dispatchEvent(new MouseEvent('click', {{bubbles: true}}));""")
        assert one.run("return location.hash;") == ""
        choices = chosen(one, **changes)
        _, right, *pictures = one.run(END)
        shown = one.run("""const lines = document.querySelector('#demo .lines'), value = name =>
                document.querySelector(`#demo [name=${name}]:checked`).value;
            const [, steps, T, eta] = [...document.querySelectorAll('#demo output')].map(e => e.textContent);
            return [lines.querySelector('a').textContent !== '', lines.querySelectorAll('.diff span').length,
                    lines.querySelector('a').getAttribute('href'), value('mistake'), value('sampler'), steps, T, +eta];""")
        assert shown[1] >= 2 and shown[::2] == [True, "#" + (place or f"mistake-{page.slug(name)}"), choices["sampler"],
                                                f"{choices['T']:,}"]
        assert shown[3::2] == [key, f"{choices['steps']:,}", choices["eta"]]
        assert right.startswith("right: 400 points at t = 0") and pictures[0] != pictures[1]
        seen.add(pictures[1])
    assert len(seen) == 9 and len(page.DEMO) == 10  # of two mistakes only the corners are left

def test_the_controls_of_the_demo(window):
    """From the keyboard: the mistakes, the numbers of steps, T and its β, the time, and Play."""
    one = window()
    focus = lambda what: one.run(f"document.querySelector('#demo {what}').focus();")
    outputs = "return [...document.querySelectorAll('#demo output')].map(e => e.textContent);"
    one.run("document.querySelector('#demo input[value=square]').click();")
    before = one.run(END)
    focus("input[value=square]")
    one.press("ArrowRight")
    assert one.run("return document.querySelector('#demo .lines a').textContent;") != "σ"
    assert one.run("return document.querySelector('#demo [name=mistake]:checked').value;") == "no-z"
    after = one.run(END)
    assert after[:3] == before[:3] and after[3] != before[3]
    focus(".settings input[type=range]")  # the number of steps
    one.press("ArrowRight")
    assert one.run(outputs)[:3] == ["t = 0", "200", "1,000"] and one.run(LOOK)[2] != after[2]
    one.run("""const T = document.querySelectorAll('#demo .settings input[type=range]')[1]; T.value = 4;
        T.dispatchEvent(new Event('input')); T.focus();""")
    one.press("ArrowLeft")
    assert one.run(outputs)[:3] == ["t = 0", "100", "100"]  # no more steps than T
    warning = "return document.querySelector('#demo .settings .numbers').textContent;"
    assert one.run(warning) == ""
    focus("input[type=checkbox]")
    one.press(" ")
    assert "ᾱ_T = 0.36" in one.run(warning)
    one.press(" ")
    eta = "return document.querySelectorAll('#demo .settings input[type=range]')[2].disabled;"
    assert one.run(eta)
    one.run("document.querySelector('#demo .sampler input[value=ddim]').click();")
    assert not one.run(eta)
    same = "return document.querySelector('#demo .wrong figcaption').textContent;"
    assert one.run(same) == "wrong: the same points"  # because DDIM has other lines
    other = one.run(LOOK)[2]
    one.run("document.querySelector('#demo [name=seed]:not(:checked)').click();")
    assert one.run(LOOK)[2] != other
    focus(".pictures input")
    one.press("ArrowLeft")
    assert one.run(outputs)[0] == "t = 1"
    one.run("""const range = document.querySelector('#demo .pictures input');
        range.value = 0; range.dispatchEvent(new Event('input'));""")
    focus("button")
    one.press("Enter")
    assert one.run("return document.querySelector('#demo button').textContent;") == "Stop"
    one.press(" ")
    stopped = one.run(outputs)[0]
    time.sleep(0.5)
    assert one.run(outputs)[0] == stopped != "t = 0"
    one.press(" ")
    assert one.run(END)[0] == "t = 0"

def test_no_motion_where_none_is_wanted(built, playwright):
    """With prefers-reduced-motion the page opens on the end, and a choice and the button lead there."""
    one = Chromium(playwright, built[0], 1400, False)
    one.page.emulate_media(reduced_motion="reduce")
    one.page.reload()
    first = one.run(LOOK)
    assert first[0] == "t = 0"
    one.run("document.querySelector('#demo input[value=plus]').click();")
    last = one.run(LOOK)
    assert last[0] == "t = 0" and last[:3] == first[:3] and last[3] != first[3]
    assert one.run("""const range = document.querySelector('#demo .pictures input');
        range.value = 0; range.dispatchEvent(new Event('input'));
        document.querySelector('#demo button').click();
        return document.querySelector('#demo output').textContent;""") == "t = 0"
    one.close()

def test_no_errors(window):
    """Nothing that was done in the windows above has left an error in the console.

    Of a formula whose end has not arrived yet Firefox says "Invalid markup"; so its parts are counted."""
    for one in (window(), window(360), window(820)):
        parts = one.run("""return ['msub', 'msup', 'munder', 'mover', 'mfrac', 'msubsup', 'munderover'].map(tag =>
            [...new Set([...document.querySelectorAll(tag)].map(e => e.children.length))]);""")
        assert parts == [[2], [2], [2], [2], [2], [3], [3]]
        assert [error for error in one.errors if not error.startswith("Invalid markup")] == []
