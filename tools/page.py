"""One page from the sources: the paper's statements, the code, its theorems, and the mistakes.

    python tools/page.py --out page/index.html        in an environment with tools/requirements.txt

The page is made of the files themselves: ddpm.py, Algorithm 1 of train.py and unet.py give
docstrings and code, PAPER.md the statements, the derivations and what one sees of a mistake, the
test files the theorems, tools/mistakes.py the wrong lines. Nothing is written twice. Formulas
become MathML, and the page fetches nothing and needs no JavaScript.
"""
from __future__ import annotations

import argparse
import ast
import base64
import html
import json
import math
import re
import string
import sys
import textwrap
import unicodedata
import xml.etree.ElementTree as ET
from pathlib import Path

try:
    import latex2mathml.converter
    from markdown_it import MarkdownIt
    from mdit_py_plugins.dollarmath import dollarmath_plugin
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer
except ImportError as error:
    sys.exit(f"page.py: {error}: pip install -r tools/requirements.txt")

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"
KEPT = ROOT / ".github" / "images" / "mistakes"

def read(name: str) -> str:
    """The text of a file of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")

def slug(text: str) -> str:
    """A name for an address within the page: letters, digits and hyphens."""
    text = unicodedata.normalize("NFKD", text.lower())
    text = "".join(c for c in text if not unicodedata.combining(c))
    return re.sub(r"[^\w]+", "-", text).strip("-")

# === Formulas in TeX ==============================================================================

HATS = {"^": "ˆ", "~": "˜"}  # characters that are accents, and not as wide as the keyboard's

def tex(source: str, display: bool = False) -> str:
    """MathML of a formula in TeX."""
    source = re.sub(r"\\[bB]ig\\lVert", r"\\left\\Vert", source)
    source = re.sub(r"\\[bB]ig\\rVert", r"\\right\\Vert", source)
    source = re.sub(r"\\[bB]ig([\[(])", r"\\left\1", source)
    source = re.sub(r"\\[bB]ig([\])])", r"\\right\1", source)
    found = latex2mathml.converter.convert(source.strip(), display="block" if display else "inline")
    found = html.unescape(re.sub(r"&#x(0003C|00026|0003E);", r"&amp;#x\1;", found))
    for letter, style, code_point in (("N", "script", "𝒩"), ("E", "double-struck", "𝔼")):
        found = found.replace(f'<mi mathvariant="{style}">{letter}</mi>', f"<mi>{code_point}</mi>")
    found = re.sub(r'<mo(?: stretchy="\w+")?>([¯^~])</mo></mover>',
                   lambda m: f'<mo stretchy="false">{HATS.get(m[1], m[1])}</mo></mover>', found)
    for kind, space in (("mo", "0"), ("mi", "0.28em")):  # the norm ‖x‖, and KL(q ‖ p)
        found = found.replace(f"<{kind}>‖</{kind}>", '<mo stretchy="false" '
                              f'lspace="{space}" rspace="{space}">‖</mo>')
    found = re.sub("<mo>=</mo><m([io])>:</m\\1>", "<mo>=:</mo>", found)
    found = found.replace("<mi>~</mi>", "<mo>∼</mo>").replace("<mi>;</mi>", "<mo>;</mo>")
    found = found.replace("ϵ", "ε")  # one ε on the page
    found = re.sub(r"(<mo>[=≤≥∼]</mo>|<mrow>)<mo>−</mo>", r'\1<mo form="prefix">−</mo>', found)
    found = re.sub(r'<mi>log</mi>(?!<mo stretchy="false">[(\[])',
                   '<mi>log</mi><mspace width="0.17em"/>', found)
    for script in ("msubsup", "msub"):  # the limits of a sum stand above and below it
        limits = {"msub": "munder", "msubsup": "munderover"}[script]
        found = re.sub(rf"<{script}>(?=<mo>[∑∏]</mo>)", f"<{limits}>", found)
        found = balanced(found, limits, script)
    found = found.replace(' xmlns="http://www.w3.org/1998/Math/MathML"', "")
    return found if display else breakable(found)

def breakable(markup: str) -> str:
    """A long formula within a line as several, so that the line may end before a relation."""
    if len(re.sub("<.*?>", "", markup)) < 18:
        return markup
    outer = ET.fromstring(markup)
    row = outer[0] if len(outer) == 1 and outer[0].tag == "mrow" else outer
    parts: list[list] = [[]]
    for child in row:
        if child.tag == "mo" and child.text in ("=", "≤", "≥", "∼", "+", "−", "∝") and parts[-1]:
            child.set("form", "infix")
            parts.append([])
        parts[-1].append(child)
    return "<wbr>".join("<math><mrow>" + "".join(ET.tostring(c, "unicode") for c in part)
                        + "</mrow></math>" for part in parts)

def balanced(markup: str, new: str, old: str) -> str:
    """The end tags </old> that belong to a start tag <new> become </new>."""
    out, stack = [], []
    for part in re.split(rf"(</?(?:{new}|{old})>)", markup):
        if re.fullmatch(rf"<(?:{new}|{old})>", part):
            stack.append(part[1:-1])
        elif re.fullmatch(rf"</(?:{new}|{old})>", part):
            part = f"</{stack.pop()}>"
        out.append(part)
    return "".join(out)

# === Formulas in docstrings =======================================================================
# Docstrings and comments write formulas in Unicode: x_{t−1}, √ᾱ_t, ‖·‖², 10⁻¹². `prose` finds them
# between the words, and `Formula` reads one: a small grammar of atoms with accents and scripts.

SUPER = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ᵀⁿ", "0123456789−+Tn"))
SUB = dict(zip("₀₁₂₃₄₅₆₇₈₉₋₊", "0123456789−+"))
ACCENTS = {"\u0302": "ˆ", "\u0303": "˜", "\u0304": "¯"}
FUNCTIONS = ("log", "exp", "KL", "Var", "erfc", "erfcx", "cos", "sin", "min", "softmax", "SiLU",
             "conv", "norm", "average", "half", "width", "dx")
CLOSING = {"(": ")", "[": "]", "{": "}"}
OPERATORS = "=≤≥<>+−·×/∈≈~∝→←∓±…≠:;"
VARIABLES = "tTDzxqpkuLCnNvibcHWKQV"  # single letters that are typeset wherever they stand

def decomposed(text: str) -> str:
    """Letters and accents apart: ᾱ is α and U+0304."""
    return unicodedata.normalize("NFD", text).replace("=\u0338", "≠")

class Formula:
    """A formula in Unicode as MathML. ValueError where the grammar does not apply."""

    def __init__(self, text: str, display: bool = False):
        self.text, self.i, self.display = decomposed(text), 0, display

    def peek(self) -> str:
        return self.text[self.i:self.i + 1]

    def row(self, end: str = "", fractions: bool = True) -> str:
        """Factors and operators up to a closing bracket, or to the end of the text.

        Displayed, a / b is a fraction: a is the product before the stroke, b the next factor.
        """
        out: list[tuple[str, str]] = []        # (kind, markup): "factor", "name" or "operator"
        over, spaced = False, False
        while self.peek() and self.peek() != end:
            if self.peek().isspace():
                self.i += 1
                spaced = True
                continue
            if self.peek() == "/" and fractions and self.display and out[-1:] and \
                    out[-1][0] == "factor":
                self.i += 1
                over = True
                continue
            start = self.i
            kind, markup = self.factor()
            if self.text[start] == "−" and (not out or out[-1][0] == "operator"):
                markup = markup.replace("<mo>", '<mo form="prefix">')
            if over:
                first = len(out)
                while first and out[first - 1][0] == "factor":
                    first -= 1
                above = "".join(part for _, part in out[first:])
                out[first:] = [("factor", f"<mfrac>{bare(above)}{bare(markup)}</mfrac>")]
                over = False
            else:
                if spaced and kind != "operator" and out and out[-1][0] == "factor":
                    out.append(("factor", '<mspace width="0.17em"/>'))
                out.append((kind, markup))
            spaced = False
        if end and not self.peek():
            raise ValueError(f"no {end!r} in {self.text!r}")
        return "<mrow>" + "".join(part for _, part in out) + "</mrow>"

    def factor(self) -> tuple[str, str]:
        """A factor, with the brackets that follow it at once: q(x_t | x_0), E_q[…], ‖x‖²."""
        start = self.text[self.i:]
        if start[0] == "‖" and self.text[self.i - 1:self.i + 2].strip(" ") != "‖":
            self.i += 1
            norm = '<mo stretchy="false" lspace="0" rspace="0">‖</mo>'
            inner = self.row("‖")
            self.i += 1
            return "factor", self.with_scripts(f"<mrow>{norm}{inner}{norm}</mrow>")
        if re.match(rf"(?:{'|'.join(FUNCTIONS)})(?![a-zA-Z(\[_])", start):
            return "name", self.scripted()
        if start[0] in OPERATORS + ",|‖" or start.startswith(("∏", "∫")) or \
                start[0] == "Σ" and not start.startswith("Σ_θ"):
            return "operator", self.scripted()
        markup = self.scripted()
        while self.peek() and self.peek() in "([" and start[0] not in "([0123456789":
            markup += self.scripted()
        return "factor", f"<mrow>{markup}</mrow>"

    def group(self) -> str:
        """What stands below a root or in a script: {…}, (…) without its brackets, or one atom."""
        if self.peek() in ("{", "("):
            end = CLOSING[self.peek()]
            self.i += 1
            found = self.row(end, fractions=False)
            self.i += 1
            return found
        return self.atom()

    def scripted(self) -> str:
        """An atom with its subscripts and superscripts."""
        if self.peek() == "√":
            self.i += 1
            inner = self.group() if self.peek() == "(" else self.scripted()
            strut = '<mspace height="0.88em"/>' * ("¯" in inner)  # between the bar and the root
            return f"<msqrt>{strut}{inner}</msqrt>"
        return self.with_scripts(self.atom())

    def with_scripts(self, base: str) -> str:
        """The subscripts and superscripts that follow, attached to what they belong to."""
        below, above = "", ""
        while True:
            c = self.peek()
            if c == "_" and not below:
                self.i += 1
                below = self.script()
            elif c == "^" and not above:
                self.i += 1
                above = self.script()
            elif c and c in "'’" and not above:
                self.i += 1
                above = "<mo>′</mo>"
            elif c in SUPER and c and not above:
                above = self.run_of(SUPER)
            elif c in SUB and c and not below:
                below = self.run_of(SUB)
            else:
                break
        kind = ("munder", "mover") if base in ("<mo>∑</mo>", "<mo>∏</mo>") else ("msub", "msup")
        kind = (kind[0] if below else "") + ((kind[1][1:] if below else kind[1]) if above else "")
        return f"<{kind}>{base}{below}{above}</{kind}>" if kind else base

    def script(self) -> str:
        if found := re.match(r"simple", self.text[self.i:]):
            self.i += found.end()
            return "<mtext>simple</mtext>"
        return self.group()

    def run_of(self, table: dict) -> str:
        start = self.i
        while self.peek() in table and self.peek():
            self.i += 1
        text = "".join(table[c] for c in self.text[start:self.i])
        kinds = {1: "mo", 2: "mn", 3: "mi"}
        return "<mrow>" + re.sub(r"([−+])|(\d+)|(\w)", lambda m: f"<{kinds[m.lastindex]}>{m[0]}"
                                 f"</{kinds[m.lastindex]}>", text) + "</mrow>"

    def atom(self) -> str:
        rest = self.text[self.i:]
        if found := re.match(r"\d+(?:[.,]\d+)*", rest):
            self.i += found.end()
            return f"<mn>{found[0]}</mn>"
        if found := re.match(rf"(?:{'|'.join(FUNCTIONS)})(?![a-z])", rest):
            if found[0] == "dx":  # the x may have an index
                self.i += 1
                return '<mspace width="0.17em"/><mi>d</mi>'
            self.i += found.end()
            return f"<mi>{found[0]}</mi>" + ("" if rest[found.end():found.end() + 1] in "([_"
                                             else '<mspace width="0.17em"/>')
        c = rest[:1]
        self.i += 1
        if not c:
            raise ValueError(f"{self.text!r} ends too early")
        if c.isalpha():
            if c == "N" and rest[1:2] == "(":
                c = "𝒩"
            elif c == "E" and re.match(r"[_\[ ]", rest[1:2] or "."):
                c = "𝔼"
            elif c == "Σ" and not rest.startswith("Σ_θ"):
                return "<mo>∑</mo>"
            if accent := ACCENTS.get(self.peek()):
                self.i += 1
                return (f'<mover accent="true"><mi>{c}</mi><mo stretchy="false">{accent}</mo>'
                        "</mover>")
            if not c.isascii() or re.match(r"[^A-Za-z]|$", rest[1:2]):
                return f"<mi>{c}</mi>"
            raise ValueError(f"{rest[:9]!r} is a word")
        if end := CLOSING.get(c):
            inner = self.row(end)
            self.i += 1
            tall = "true" if "<mfrac>" in inner else "false"
            return (f'<mrow><mo stretchy="{tall}">{c}</mo>{inner}<mo stretchy="{tall}">{end}</mo>'
                    "</mrow>")
        spaced = rest[1:2] == " " and self.text[self.i - 2:self.i - 1] == " "
        if c in "|‖":
            space = "0.28em" if spaced else "0"
            return f'<mo stretchy="false" lspace="{space}" rspace="{space}">{c}</mo>'
        if c in "½":
            return "<mfrac><mn>1</mn><mn>2</mn></mfrac>"
        if rest.startswith("=:"):
            self.i += 1
            return "<mo>=:</mo>"
        if c and (c in OPERATORS or c in ",∏∫∇∞"):
            kind = "mi" if c in "∞∇" else "mo"
            return f"<{kind}>{html.escape(c.replace('~', '∼'))}</{kind}>"
        raise ValueError(f"{c!r} in {self.text!r} is no formula")

def bare(markup: str) -> str:
    """Without the brackets around all of it, which a fraction does not need."""
    row = ET.fromstring(f"<mrow>{markup}</mrow>")
    while len(row) == 1 and row[0].tag == "mrow":
        row = row[0]
    if len(row) == 3 and (row[0].text, row[2].text) == ("(", ")"):
        row = row[1]
    return ET.tostring(row, "unicode")

def formula(text: str, display: bool = False) -> str:
    """MathML of a formula in Unicode; ValueError if it is none."""
    reader = Formula(text, display)
    if display:
        return f'<math displaystyle="true">{reader.row()}</math>'
    return breakable(f"<math>{reader.row()}</math>")

LETTER = r"[A-Za-zα-ωΑ-Ω∇∞][\u0302\u0303\u0304]?"
TOKEN = re.compile(
    r"(?P<code>`[^`]*`)"
    r"|(?P<flag>--[a-z][a-z-]*)"
    r"|(?P<possessive>['’]s\b)"
    r"|(?P<shape>\(B,[^)]*\))"
    r"|(?P<word>(?:Eqs?\.|Algorithms?|Alg\.|Tables?|Figures?|lines?|Appendix|§) ?\d[\d.]*"
    r"(?:(?:, | and | to )\d[\d.]*)*|\bDDPM\b)"
    rf"|(?P<name>\b(?!(?:{'|'.join(FUNCTIONS)}|L_simple)(?![a-z]))[A-Za-z][A-Za-z0-9]*"
    r"(?:[_.*-][A-Za-z]{2,}|[A-Za-z0-9])(?:[\w.*-]*\w)?"
    r"(?:\((?:[^()_α-ω]|\((?:[^()_α-ω]|\([^()_α-ω]*\))*\))*\))?)"  # and a call: f(g(x))
    rf"|(?P<strong>{LETTER}(?:['’]?[_^](?:simple|\{{[^}}]*\}}|[\w][\u0302-\u0304]?)|['’])"
    rf"|[α-ωΑ-Ω][\u0302-\u0304]?|[A-Za-z][\u0302-\u0304]|[√∏∫∇‖½]"
    rf"|N(?=\()|(?:\d+(?:[.,]\d+)*|[)\]A-Za-z‖}}])[{''.join(SUPER)}{''.join(SUB)}]+)"
    rf"|(?P<function>\b(?:{'|'.join(FUNCTIONS)})(?![a-z]))"
    r"|(?P<number>\d+(?:[.,]\d+)*)"
    r"|(?P<letter>(?<![A-Za-z])[A-Za-z](?![A-Za-z0-9_]))"
    r"|(?P<relation>[=≤≥<>≈∈∝≠~])"
    rf"|(?P<weak>[{re.escape(OPERATORS)}|()\[\]{{}},^_{''.join(SUPER)}{''.join(SUB)}])"
    r"|(?P<space> +)"
    r"|(?P<other>.)", re.S)

class Link:
    """Which `names` lead somewhere on the page, and which are arguments of the function at hand."""

    def __init__(self, units: dict | None = None, arguments=()):
        self.units, self.arguments = {} if units is None else units, set(arguments)

    def __call__(self, name: str) -> str | None:
        return self.units.get(name.removeprefix("ddpm.").removesuffix("()"))

def prose(text: str, link: Link = Link(), display: bool = False) -> str:
    """A sentence with its formulas typeset and its `names` as code."""
    text = decomposed(" ".join(text.split()))
    out, run, depth = [], [], 0

    def flush() -> None:
        nonlocal run, depth
        pieces, run, depth = run, [], 0
        out.append(math_or_text(pieces, display))

    for found in TOKEN.finditer(text):
        kind, token = found.lastgroup, found[0]
        after = text[found.end():found.end() + 1]
        if kind in ("name", "letter", "strong") and (
                token in link.arguments and (after == ":" or kind == "name" and "_" in token)
                or kind == "name" and "(" in token and token.split("(")[0] in link.arguments):
            kind = "code"
        if kind in ("code", "flag", "word", "name", "other", "possessive", "shape") or \
                (kind == "weak" and token in ",:;" and depth <= 0) or \
                (kind == "letter" and token in "aA" and
                 not (depth > 0 and re.match(r" ?[=,+/)]", text[found.end():]))):
            before = text[found.start() - 1:found.start()]
            if kind == "weak" and token == ":" and "=" in (before, after):
                run.append((kind, token))
                continue
            flush()
            if kind in ("code", "flag"):
                name = token.strip("`")
                target = link(name)
                code = f"<code>{html.escape(name)}</code>"
                out.append(f'<a href="#{target}">{code}</a>' if target else code)
            else:
                out.append(html.escape(unicodedata.normalize("NFC", token)))
            continue
        depth += sum(token.count(c) for c in "([{") - sum(token.count(c) for c in ")]}")
        run.append((kind, token))
    flush()
    return "".join(out)

def math_or_text(pieces: list[tuple[str, str]], display: bool) -> str:
    """A run of tokens that may be a formula: trimmed until its brackets match, then typeset."""
    def text_of(some) -> str:
        return "".join(token for _, token in some)

    def plain(some) -> str:
        return html.escape(unicodedata.normalize("NFC", text_of(some)))

    first, last = 0, len(pieces)

    def unmatched(some) -> int | None:
        """The place of a bracket without its partner, or None."""
        open_at = []
        for place, (_, token) in enumerate(some):
            for c in token:
                if c in "([{":
                    open_at.append(place)
                elif c in ")]}":
                    if not open_at:
                        return place
                    open_at.pop()
        return open_at[-1] if open_at else None

    while first < last:
        kind, token = pieces[first]
        if kind == "space" or (kind in ("weak", "relation") and token not in "([{−"):
            first += 1
            continue
        kind, token = pieces[last - 1]
        if kind in ("space", "relation") or (kind == "weak" and token not in ENDS):
            last -= 1
            continue
        some = pieces[first:last]
        bad = unmatched(some)
        if bad is None:
            break
        left, right = some[:bad], some[bad + 1:]
        return (plain(pieces[:first]) + math_or_text(left, display) + plain([some[bad]])
                + math_or_text(right, display) + plain(pieces[last:]))
    some = pieces[first:last]
    kinds = [kind for kind, _ in some]
    variable = any(kind == "letter" and token in VARIABLES for kind, token in some)
    strong = "strong" in kinds or variable and (
        len(some) == 1 or any(kind == "relation" or token in "−+/·×…→^" for kind, token in some))
    if not strong:
        return plain(pieces)
    try:
        return plain(pieces[:first]) + formula(text_of(some), display) + plain(pieces[last:])
    except ValueError:
        return plain(pieces)

ENDS = ")]}…∞" + "".join(SUPER) + "".join(SUB)
LABEL = re.compile(r"\s{2,}\[([^\]]*\d[^\]]*)\]\s*$")

def display(line: str, link) -> str:
    """One line that is a formula, with its number at the right."""
    label = LABEL.search(line)
    text = re.sub(r"\s+", " ", LABEL.sub("", line)).strip()
    number = f'<span class="number">{prose(label[1])}</span>' if label else ""
    return f'<div class="formula"><span>{prose(text, link, True)}</span>{number}</div>'

def document(text: str, link) -> str:
    """A docstring or a comment: paragraphs, and indented formulas or tables."""
    out = []
    for block in re.split(r"\n\s*\n", textwrap.dedent(text).strip("\n")):
        lines = block.splitlines()
        if lines and LABEL.search(lines[0]):  # the formula that the docstring begins with
            out.append(display(lines[0], link))
            lines = lines[1:]
        while lines:
            indented = lines[0].startswith("    ")
            n = next((i for i, line in enumerate(lines) if line.startswith("    ") != indented),
                     len(lines))
            part, lines = lines[:n], lines[n:]
            entries = re.findall(r"(?m)^    (\S.*?) {2,}(\S.*(?:\n     .*)*)", "\n".join(part))
            if not indented:
                out.append(f"<p>{prose(' '.join(part), link)}</p>")
            elif len(entries) > 2 and part[0].startswith("    t "):  # the list of symbols
                out.append("<dl>" + "".join(
                    f"<dt>{', '.join(f'<code>{html.escape(n)}</code>' for n in name.split(', '))}"
                    f"</dt><dd>{prose(said, link)}</dd>" for name, said in entries) + "</dl>")
            elif any(re.search(r"\w\(.*\).*=|= .*\w\(|^\s+(for|with|if)\b|^\s+\w+\s{2,}\S", line)
                     and not re.search(r"[α-ωθ∏‖μ]", line) for line in part):
                out.append(f"<pre>{html.escape(textwrap.dedent(chr(10).join(part)))}</pre>")
            else:
                out += [display(line, link) for line in part]
    return "\n".join(out)

# === Markdown =====================================================================================

MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table").use(
    dollarmath_plugin, double_inline=True, allow_space=True,
    renderer=lambda source, options: tex(source, options["display_mode"]))

def markdown(text: str) -> str:
    """HTML of a part of PAPER.md."""
    return re.sub(r'(?s)<div class="math block">\n?(.*?)\n?</div>',
                  r'<div class="formula"><span>\1</span></div>', MARKDOWN.render(text))

def inline(text: str) -> str:
    """HTML of one paragraph, without its tags."""
    return re.sub(r"^<p>|</p>$", "", markdown(text).strip())

def chapter(title: str) -> str:
    """The text below a heading of PAPER.md."""
    return read("PAPER.md").split(f"## {title}\n")[1].split("\n## ")[0]

def table(title: str) -> list[list[str]]:
    """The cells of the first table below a heading of PAPER.md."""
    lines = [line for line in chapter(title).splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]

def numbers(label: str) -> set[int]:
    """The equations that a heading or a label names: "Eqs. 8 to 12" is 8, 9, …, 12."""
    found: set[int] = set()
    for part in re.findall(r"Eqs?\. ([\d, tand]+)", label.split("→")[-1]):
        ends = [int(n) for n in re.findall(r"\d+", part)]
        found |= set(range(ends[0], ends[-1] + 1)) if " to " in part else set(ends)
    return found

# === The parts of the page ========================================================================

CODE = HtmlFormatter(nowrap=True)
COLOURED = "k kn kc ow s1 s2 sd sa si se c1 mi mf nf nc nd fm".split()  # by page.css

def code(source: str) -> str:
    """A listing, coloured."""
    found = highlight(source, PythonLexer(stripnl=False), CODE).rstrip()
    found = re.sub(r'<span class="(\w+)">([^<]*)</span>', lambda m: f"<span class={m[1]}>{m[2]}"
                   "</span>" if m[1] in COLOURED else m[2], found)
    return f"<pre class=code>{found}</pre>"

def first_line(node: ast.AST) -> int:
    """The line on which a statement begins, with its decorators."""
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])

def without_docstring(source: str, node: ast.AST) -> str:
    """The lines of a function or class without its docstring."""
    lines, doc = source.splitlines(), None
    body = getattr(node, "body", [])
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        doc = body[0]
    first = first_line(node)
    kept = [line for i, line in enumerate(lines[first - 1:node.end_lineno], first)
            if not (doc and doc.lineno <= i <= doc.end_lineno)]
    return re.sub(r"^\s*\n", "", "\n".join(kept)).rstrip()

def items(source: str) -> list[tuple[str, object]]:
    """Banners (their rule and title), comments between statements, and statements, in order."""
    lines, out, i = source.splitlines(), [], 0
    starts = {first_line(node): node for node in ast.parse(source).body[1:]}
    while i < len(lines):
        if node := starts.get(i + 1):
            out.append(("statement", node))
            i = node.end_lineno
        elif banner := re.match(r"# (===|---) (.*?) (?:=+|-+)$", lines[i]):
            out.append(("banner", (banner[1], banner[2])))
            i += 1
        elif lines[i].startswith("#"):
            end = i
            while end < len(lines) and lines[end].startswith("#"):
                end += 1
            out.append(("text", "\n".join(re.sub("^# ?", "", line) for line in lines[i:end])))
            i = end
        else:
            i += 1
    return out

def section(source: str, banner: tuple[str, str]) -> str:
    """The comment below a banner."""
    rest = source.split(f"# {banner[0]} {banner[1]} ", 1)[1]
    return re.match(r".*\n(?:#.*\n)*", rest)[0]

def whole_lines(file: str, replacements: list) -> list[tuple[str, str]]:
    """The right lines and the wrong ones, in full."""
    source, pairs = read(file), []
    for right, wrong in replacements:
        first = source.index(right)
        end = source.index("\n", first + len(right) - 1) + 1
        lines = source[source.rfind("\n", 0, first) + 1:end]
        pairs.append(tuple(textwrap.dedent(text).rstrip() or "(this line is not there)"
                           for text in (lines, lines.replace(right, wrong))))
    return pairs

def diff(pairs: list) -> str:
    """Lines with the right program and with the wrong one, below each other."""
    return "<pre class=diff>" + "".join(
        f"<span class=right>{html.escape(right)}</span>"
        f"<span class=wrong>{html.escape(wrong)}</span>"
        for right, wrong in pairs) + "</pre>"

class Page:
    """Collects the parts, their names for the table of contents, and what was shown already."""

    def __init__(self):
        self.body: list[str] = []
        self.contents: list[tuple[int, str, str]] = []  # level, address, title
        self.units: dict[str, str] = {}                # function or class → address
        self.link = Link(self.units)
        self.shown: set[str] = set()                   # tests
        self.named: set[str] = set()                   # tests to which there is a link
        self.pictures: dict[str, str] = {}             # name → picture
        self.rows = table("The map")
        self.waiting: list[str] = []                   # tests to show below a section's text
        self.symptoms = {row[0]: row[1] for row in table("Easy mistakes") if len(row) == 3}
        tree = ast.parse(read("tools/mistakes.py"))
        space: dict = {}
        for node in tree.body:  # the tables of that file, which imports torch, without the rest
            if isinstance(node, ast.Assign) and not ast.unparse(node).startswith(("ROOT", "KEPT")):
                exec(compile(ast.Module([node], []), "mistakes.py", "exec"), space)
        self.mistakes, self.controls = space["MISTAKES"], space["CONTROLS"]
        self.left = {name for name, entry in self.mistakes.items() if entry[3]}
        self.home = {}                                 # test → (file, the line that it guards)
        for file, test, replacements, _ in self.mistakes.values():
            self.home.setdefault(test.split(".")[1], (file, replacements[0][0]))
        for _, _, functions, tests in self.rows:
            if "`" not in functions:  # a comment: it stands below that
                self.home.update((test, ("", "")) for test in re.findall(r"`(test_\w+)`", tests))
        self.tests = {}
        for path in [ROOT / "test_ddpm.py", *sorted((ROOT / "tests").glob("test_*.py"))]:
            source = path.read_text(encoding="utf-8")
            for node in ast.parse(source).body:
                if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                    self.tests[node.name] = (path.name, source, node)
        self.results = json.loads((KEPT / "results.json").read_text(encoding="utf-8"))

    def link_of(self, node: ast.AST) -> Link:
        """The links of the page, with the arguments of a function."""
        found = getattr(node, "args", None)
        named = [*found.args, *filter(None, [found.kwarg])] if found else []
        return Link(self.units, [argument.arg for argument in named])

    def heading(self, level: int, title: str, address: str, shown: str | None = None) -> None:
        self.contents.append((level, address, shown or prose(title)))
        self.body.append(f'<h{level} id="{address}"><a class=anchor href="#{address}" aria-label='
                         f'"Link to this section">#</a>{shown or prose(title)}</h{level}>')

    def statements(self, title: str, text: str) -> None:
        """What the map says about the equations of a heading, unless the comment there says it.

        The theorems of an equation that no function computes wait until that text is over."""
        shown = set().union(*(numbers(m[1]) for m in map(LABEL.search, text.splitlines()) if m))
        for label, statement, functions, tests in self.rows:
            if not numbers(label) & numbers(title):
                continue
            if not numbers(label) <= shown and statement.startswith("$") and "`" in functions:
                self.body.append(f'<div class=statement><span class=label>{inline(label)}</span>'
                                 f'<div class="formula"><span>{tex(statement.strip("$"), True)}'
                                 "</span></div></div>")
            if "`" not in functions:
                self.waiting += re.findall(r"`(test_\w+)`", tests)

    def derivations(self, title: str) -> None:
        """The derivations of PAPER.md that belong to the equations of a heading."""
        for name, text in re.findall(r"(?ms)^### (.*?)\n(.*?)(?=^### |\Z)",
                                     chapter("The derivations")):
            if min(numbers(name)) in numbers(title):
                self.body.append("<details class=derivation open><summary>Derivation: "
                                 f"{inline(name)}</summary><div class=inside "
                                 f'id="derivation-{slug(name)}">{markdown(text)}</div></details>')

    def theorem(self, name: str, here: bool = True) -> str:
        """A test, folded; elsewhere than where it belongs, a link to it."""
        file, source, node = self.tests[name]
        said = ast.get_docstring(node) or name
        first, _, rest = said.partition("\n\n")
        link = self.link_of(node)
        if name in self.shown or not here:
            self.named.add(name)
            return (f'<p class=again>Theorem, shown elsewhere: <a href="#{name}">'
                    f"{prose(first, link)}</a></p>")
        self.shown.add(name)
        return (f"<details class=theorem><summary>Theorem: {prose(first, link)}</summary>"
                f'<div class=inside id="{name}">{document(rest, link)}<p class=file>'
                f"<code>{file}</code>: <code>pytest -k {name}</code></p>"
                f"{code(without_docstring(source, node))}{libraries(name)}</div></details>")

    def mistake(self, name: str) -> str:
        """A mistake, folded: what one sees, right and wrong line, pictures, the failing test."""
        self.left.discard(name)
        file, test, replacements, controls = self.mistakes[name]
        seen = "".join(self.seen(name, control) for control in controls.split())
        test = test.split(".")[1]
        target = f'<a href="#{test}"><code>{test}</code></a>' if test in self.shown else \
            f"<code>{test}</code>"
        return (f"<details class=mistake><summary>Easy mistake: {prose(name, self.link)}</summary>"
                f'<div class=inside id="mistake-{slug(name)}">'
                f"<p>{prose(self.symptoms[name], self.link)}</p>"
                f"{diff(whole_lines(file, replacements))}{seen}<p class=file>In "
                f"<code>{file}</code>; noticed by {target}</p></div></details>")

    def seen(self, name: str, control: str) -> str:
        """The numbers, the pictures and the loss of the runs."""
        result, right = (self.results[f"{control}/{line}"] for line in (name, "right"))
        figures = ""
        for one, title in ((right, "right"), (result, "wrong")):
            if one["picture"]:
                figures += (f'<figure><svg role=img aria-label="what comes with the {title} line" '
                            f'viewBox="0 0 {one["width"]} {one["height"]}" '
                            f'width={3 * one["width"]} height={3 * one["height"]}>'
                            f'<use href="#{self.picture(one)}"/></svg>'
                            f"<figcaption>{title}</figcaption></figure>")
        if result["loss"] and right["loss"]:
            figures += curve(right["loss"], result["loss"])
        lines = diff(result["printed"]) if result["printed"] else ""
        text = "" if lines and result["text"] == "nothing" else html.escape(result["text"])
        return (f'<p class=numbers>Seen (<a href="#runs">{control}</a>) {text}</p>'
                f"{lines}<div class=seen>{figures}</div>")

    def picture(self, run: dict) -> str:
        """The name of a picture, which is in the page once however often it is shown."""
        name = "picture-" + run["picture"].removesuffix(".png")
        content = base64.b64encode((KEPT / run["picture"]).read_bytes()).decode()
        self.pictures[name] = (f'<image id="{name}" width={run["width"]} height={run["height"]} '
                               f'href="data:image/png;base64,{content}"/>')
        return name

    def unit(self, source: str, node: ast.AST, file: str) -> None:
        """A function, a class or other lines: docstring beside code, theorems, mistakes."""
        name = getattr(node, "name", None)
        text = without_docstring(source, node)
        self.body.append(f'<section class=unit{f" id={self.units[name]}" if name else ""}>')
        doc = ast.get_docstring(node) if name else ""
        anchor = (f'<h5><a class=anchor href="#{self.units[name]}" aria-label="Link to {name}">#'
                  f"</a><code>{name}</code></h5>") if name else ""
        self.body.append(f"<div class=said>{anchor}\n{document(doc, self.link_of(node))}</div>"
                         f"<div class=done>{code(text)}")
        whole = "\n".join(source.splitlines()[node.lineno - 1:node.end_lineno])
        wrong = [m for m, (path, _, replacements, controls) in self.mistakes.items()
                 if path == file and controls and m in self.left and replacements[0][0] in whole]
        tests = [test for test, (path, line) in self.home.items() if path == file and line in whole]
        for _, _, functions, some in self.rows:
            if name and re.search(rf"`(\w+\.)?{name}`", functions):
                listed = re.findall(r"`(test_\w+)`", some)
                near = [t for t in listed if re.search(rf"\b{name}\b", ast.get_source_segment(
                    self.tests[t][1], self.tests[t][2]))]
                tests += near or listed
        for test in dict.fromkeys(tests):
            path, line = self.home.get(test, (file, whole))
            self.body.append(self.theorem(test, here=path == file and line in whole))
        self.body += [self.mistake(m) for m in wrong]
        self.body.append("</div></section>")

    def file(self, name: str, title: str, only: str = "", names: tuple = ()) -> None:
        """A source file in its own order; `only` one of its sections, or some functions."""
        source = read(name)
        parts = items(source)
        for kind, thing in parts:
            if kind == "statement" and hasattr(thing, "name"):
                prefix = "" if name == "ddpm.py" else f"{Path(name).stem}-"
                self.units[thing.name] = prefix + thing.name
        self.heading(2, title, slug(name), f"<code>{name}</code>: {title}")
        if not only and not names:
            said = ast.get_docstring(ast.parse(source))
            self.body.append(f"<div class=prose>{document(said, self.link)}</div>")
        inside, due, plain = not only, "", []
        for kind, thing in [*parts, ("end", None)]:
            if kind == "banner" and thing[0] == "===":
                inside = not only or only in thing[1]
            if not inside and kind != "end" or names and getattr(thing, "name", "") not in names:
                continue
            if kind != "text" and due and name == "ddpm.py":  # below the text of the section
                self.derivations(due)
                self.body += ["<div class=prose>", *map(self.theorem, self.waiting), "</div>"]
                self.waiting, due = [], ""
            if plain and (kind != "statement" or hasattr(thing, "name")):
                self.body.append("<section class=unit><div class=said></div><div class=done>"
                                 f"{code(chr(10).join(plain))}</div></section>")
                plain = []
            if kind == "banner":
                level, due = 3 if thing[0] == "===" else 4, thing[1]
                self.heading(level, due, slug(due))
                self.statements(due, section(source, thing))
            elif kind == "text":
                self.body.append(f"<div class=prose>{document(thing, self.link)}</div>")
            elif kind == "statement" and hasattr(thing, "name"):
                self.unit(source, thing, name)
            elif kind == "statement":
                plain.append(ast.get_source_segment(source, thing))

    def helpers(self) -> None:
        """The tests that a link named and no function has shown, and what the theorems share."""
        self.heading(2, "What the theorems share", "helpers")
        source = read("test_ddpm.py")
        tree, lines = ast.parse(source), source.splitlines()
        shared = ["\n".join(lines[first_line(node) - 1:node.end_lineno]) for node in tree.body[1:]
                  if not getattr(node, "name", "").startswith("test_")]
        self.body.append(f"<div class=prose>{document(ast.get_docstring(tree), self.link)}"
                         "<details class=helpers><summary>The helpers of <code>test_ddpm.py</code>"
                         f"</summary>{code(chr(10).join(shared))}</details>"
                         + "".join(self.theorem(test) for test in sorted(self.named - self.shown))
                         + "</div>")

    def runs(self) -> None:
        """How the mistakes were run: PAPER.md's text, and the commands of each control."""
        self.heading(2, "How the mistakes were run", "runs")
        said = chapter("Easy mistakes").split("\n| ")[0]
        rows = "".join(f"<dt>{name}</dt><dd>" + "<br>".join(
            f"<code>{html.escape(line)}</code>" for line in lines) + "</dd>"
            for name, lines in self.controls.items())
        self.body.append(f"<div class=prose>{markdown(said[said.index('**The runs.**'):])}"
                         "<details><summary>The commands: TREE is the program, right or wrong, "
                         "SHARED the network of the right lines, TRAIN and TEST the images"
                         f"</summary><dl>{rows}</dl></details></div>")

    def seen_first(self) -> None:
        """The symptoms, with links to the mistakes that look so."""
        self.heading(2, "Symptoms", "symptoms")
        rows = "".join(f"<tr><td>{prose(what)}</td><td>" + "; ".join(
            f'<a href="#mistake-{slug(name)}">{prose(name)}</a>' for name in names.split("; "))
            + "</td></tr>" for what, names in table("Symptoms"))
        said = markdown(chapter("Symptoms").split("\n| ")[0])
        self.body.append(f"<div class=prose>{said}<table><thead><tr><th>what you see</th><th>"
                         f"what it may be</th></tr></thead><tbody>{rows}</tbody></table></div>")

    def judged(self) -> None:
        """Your own implementation and four libraries, judged."""
        self.heading(2, "Check your own", "judge")
        self.body.append(
            "<div class=prose><p>The statements of the paper can judge any implementation: fill in "
            "this file, and run <code>python -m pytest test_ddpm.py --implementation my_ddpm.py"
            "</code>. Without a value the flag prints the interface.</p><details><summary>The file "
            f"to fill in</summary>{code(read('tools/template.py'))}</details>")
        text = re.sub(r"(?<!\w)(\w[\u0300-\u036f]?)_(\w)(?!\w)", r"\1<sub>\2</sub>",
                      markdown(chapter("Four libraries, judged")))
        while "_{" in text:  # from the inside out
            text = re.sub(r"_\{([^{}]*)\}", r"<sub>\1</sub>", text)
        self.body.append(f"{text}</div>")

    def others(self) -> None:
        """The mistakes in files that are not on this page."""
        self.heading(2, "Mistakes in other files", "elsewhere")
        self.body.append("<div class=prose>" + "".join(
            self.mistake(name) for name in self.mistakes if name in self.left) + "</div>")

def libraries(theorem: str) -> str:
    """In which libraries the judge's statements of the same equation hold, and in which not."""
    record, found = json.loads(read("tools/peers/matrix.json"))["libraries"], {}
    for library, judged in record.items():
        for name, row in judged["theorems"].items():
            if name.split("_")[0] == theorem.split("_")[1] and row["verdict"] != "not offered":
                bad = row["verdict"] == "fails" and judged["notes"].get(name, [""])[0] != "choice"
                found[library] = found.get(library, False) or bad
    said = [f"{word} in {', '.join(names)}" for word, bad in (("holds", False), ("fails", True))
            if (names := [name for name in found if found[name] is bad])]
    judged = '<a href="#judge">judged</a>'
    return f"<p class=file>As {judged}, the equation {'; '.join(said)}.</p>" if said else ""

def curve(right: list, wrong: list) -> str:
    """The two loss curves as a small drawing, on logarithmic axes."""
    points = {name: [(math.log(step), math.log(max(loss, 1e-9))) for step, loss in some if loss]
              for name, some in (("right", right), ("wrong", wrong))}
    every = [p for some in points.values() for p in some]
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*every))
    paths = "".join(
        f'<polyline class={name} points="' + " ".join(
            f"{4 + 152 * (x - x0) / (x1 - x0 or 1):.1f},{100 - 92 * (y - y0) / (y1 - y0 or 1):.1f}"
            for x, y in some) + '"/>' for name, some in points.items())
    return ('<figure><svg viewBox="0 0 160 104" width=240 height=156 role=img aria-label="Loss over'
            f' steps, right and wrong">{paths}</svg><figcaption>loss over steps, both axes '
            f"logarithmic: {math.exp(y1):.2g} to {math.exp(y0):.2g}</figcaption></figure>")

def build(repository: str = "") -> str:
    """The page; repository: its address, to which the page then links."""
    repository = f' <a href="{repository}">The repository.</a>' if repository else ""
    page = Page()
    page.file("ddpm.py", "the mathematics")
    page.file("train.py", "training", only="Algorithm 1")
    page.file("support/data.py", "scaling (§3.3)", names=("to_model", "to_uint8"))
    page.file("unet.py", "the network")
    page.seen_first()
    page.judged()
    page.runs()
    page.others()
    page.helpers()
    entries, depth = [], 2
    for level, address, title in page.contents:
        entries.append("<ul>" * (level - depth) + "</ul>" * (depth - level)
                       + f'<li><a href="#{address}">{title}</a></li>')
        depth = level
    contents = "<ul>" + "".join(entries) + "</ul>" * (depth - 1)
    font = base64.b64encode((TOOLS / "math.woff2").read_bytes()).decode()
    style = (TOOLS / "page.css").read_text(encoding="utf-8").replace("FONT", font)
    body = re.sub(r"(<math>(?:(?!</math>).)*</math>)([.,;:?)]+)",  # a line begins with no full stop
                  r"<span class=nb>\1\2</span>", "\n".join(page.body))
    return TEMPLATE.substitute(style=style, contents=contents, body=body,
                               pictures="".join(page.pictures.values()),
                               paper=inline(read("PAPER.md").splitlines()[2]),
                               repository=repository)

TEMPLATE = string.Template("""<!doctype html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<title>Denoising Diffusion Probabilistic Models, annotated</title>
<style>
$style</style>
</head>
<body>
<header><h1>Denoising Diffusion Probabilistic Models</h1>
<p>$paper On this page the paper's statements stand beside the code that computes
them.$repository</p>
<p>A <em>theorem</em> is a test. It states an identity and compares the code with a second
computation, which shares nothing with it but Eq. 2, in most tests for cases that hypothesis draws.
Its <a href="#helpers">helpers</a> are on the page. "Kills" names wrong variants of the code on
which the test fails. An <em>easy mistake</em> shows a wrong line, what was seen when the
program <a href="#runs">was run</a> with it, and the theorem that notices it.</p></header>
<nav aria-label=Contents>$contents</nav>
<svg width=0 height=0 aria-hidden=true><defs>$pictures</defs></svg>
<main>
$body
</main>
</body>
</html>
""")

def main(argv=None) -> int:
    """Writes the page: see the text at the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("page/index.html"),
                        help="(default: page/index.html)")
    parser.add_argument("--repository", default="", help="address to which the page links")
    args = parser.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text := build(args.repository), encoding="utf-8")
    print(f"{args.out}: {len(text.encode()) / 1000:.0f} kB")
    return 0

if __name__ == "__main__":
    sys.exit(main())
