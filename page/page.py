"""One page from the sources: the paper's statements, the code, its theorems, and the mistakes.

    python page/page.py --out site/index.html        in an environment with page/requirements.txt

The page is made of the files themselves: ddpm.py, Algorithm 1 of train.py and unet.py give
docstrings and code, PAPER.md the statements, the derivations and what one sees of a mistake, the
test files the theorems, page/mistakes.py the wrong lines, page/figures.py the pictures, and
page/demo.js draws the points of the first screen. Nothing is written twice. Formulas become
MathML. The page fetches nothing, and is whole without its script.
"""
from __future__ import annotations

import argparse
import ast
import base64
import functools
import html
import itertools
import json
import math
import re
import string
import sys
import struct
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
    sys.exit(f"page.py: {error}: pip install -r page/requirements.txt")

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "page"
KEPT = HERE / "images" / "mistakes"
DRAWN = HERE / "images"

@functools.cache
def read(name: str) -> str:
    """The text of a file of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")

MARKS = {"\u0302": "-hat", "\u0303": "-tilde", "\u0304": "-bar"}

def slug(text: str) -> str:
    """A name for an address within the page, in ASCII: ᾱ_t is alpha-bar-t."""
    out = ""
    for c in unicodedata.normalize("NFKD", text.lower()):
        name = unicodedata.name(c, "")
        out += MARKS.get(c, c if c.isascii() else
                         name.split()[-1].lower() if name.startswith("GREEK SMALL") else
                         "" if unicodedata.combining(c) else "-")
    return re.sub(r"[^a-z0-9]+", "-", out).strip("-")

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
    found = re.sub(r'<mover(?: accent="true")?>((?:<mrow>)?<m[io]>[^<]*</m[io]>(?:</mrow>)?)'
                   r'<mo(?: stretchy="\w+")?>([¯^~])</mo></mover>',
                   lambda m: f'<mover accent="true">{m[1]}<mo stretchy="false">'
                   f"{HATS.get(m[2], m[2])}</mo></mover>", found)
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
    found = re.sub(' xmlns="[^"]*"| display="inline"', "", found)
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
            inner = self.row("‖")
            norm = f'<mo stretchy="{str("<mfrac>" in inner).lower()}" lspace="0" rspace="0">‖</mo>'
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
        return self.units.get(re.sub(r"^(ddpm|train|unet)\.", "", name).removesuffix("()"))

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
    """HTML of a part of a document."""
    found = re.sub(r'(?s)<div class="math block">\n?(.*?)\n?</div>',
                   r'<div class="formula"><span>\1</span></div>', MARKDOWN.render(text))
    found = re.sub(r'<span class="math inline">(.*?)</span>', r"\1", found)
    found = found.replace("<th></th>", "<td></td>")
    return re.sub(r"(?s)<table>.*?</table>", lambda m: wide(m[0]), found)

def wide(table: str) -> str:
    """A table that may be wider than the page, in a box that scrolls by itself."""
    heads = [re.sub("<.*?>", "", cell) for cell in re.findall("<th.*?>(.*?)</th>", table)]
    label = f"Table {next(COUNT)}: {', '.join(filter(None, heads))}"
    return f'<div class=wide tabindex=0 role=region aria-label="{label}">{table}</div>'

COUNT = itertools.count(1)

def inline(text: str) -> str:
    """HTML of one paragraph, without its tags."""
    return re.sub(r"^<p>|</p>$", "", markdown(text).strip())

DOCUMENTS = ("PAPER.md", *(f"docs/{name}.md" for name in (
    "questions", "mistakes", "coding", "libraries", "measurements", "history")))

def chapter(title: str) -> str:
    """The text below a heading of PAPER.md or of a page in docs/."""
    said = "\n".join(map(read, DOCUMENTS)).split(f"\n## {title}\n")[1]
    return re.split("\n##? ", said)[0]

def table(title: str) -> list[list[str]]:
    """The cells of the first table below a heading."""
    lines = [line for line in chapter(title).splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]

def numbers(label: str) -> set[int]:
    """The equations that a heading or a label names: "Eqs. 8 to 12" is 8, 9, …, 12."""
    found: set[int] = set()
    for part in re.findall(r"Eqs?\. ([\d, toand]+)", label.split("→")[-1]):
        ends = [int(n) for n in re.findall(r"\d+", part)]
        found |= set(range(ends[0], ends[-1] + 1)) if " to " in part else set(ends)
    return found

# === The parts of the page ========================================================================

CODE = HtmlFormatter(nowrap=True)
COLOURED = "k kn kc ow s1 s2 sd sa si se c1 mi mf nf nc nd fm".split()  # by page.css

def code(source: str, kind: str = "code") -> str:
    """A listing, coloured; kind: its class, "code" for what the page is about."""
    found = highlight(source, PythonLexer(stripnl=False), CODE).rstrip()
    found = re.sub(r'<span class="(\w+)">([^<]*)</span>', lambda m: f"<span class={m[1]}>{m[2]}"
                   "</span>" if m[1] in COLOURED else m[2], found)
    return f'<pre class="{kind}">{found}</pre>'

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
    """What stands below a banner, up to the next one."""
    rest = source.split(f"# {banner[0]} {banner[1]} ", 1)[1]
    return re.split(r"(?m)^# (?:===|---) ", rest)[0].replace('."""', "").replace('"""', "")

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
        self.level = 1                                 # of the last heading
        self.units: dict[str, str] = {}                # function or class → address
        self.link = Link(self.units)
        self.shown: set[str] = set()                   # tests
        self.named: set[str] = set()                   # tests to which there is a link
        self.pictures: dict[str, str] = {}             # name → picture
        self.rows = [(label, said.replace("$ $", " "), *named.split("<br>"))
                     for label, said, named in table("The map")]
        self.waiting: list[str] = []                   # tests to show below a section's text
        self.above = ""                                # what stands above the code of a function
        self.symptoms = {name: said.split(" <br>")[0]
                         for name, said in table("Easy mistakes") if said}
        self.algorithms = dict(re.findall(r"(?ms)^### Algorithm (\d): \w+\n\n(.*?)(?=^### |\Z)",
                                          chapter("The four algorithms")))
        self.mistakes, self.controls = tables("page/mistakes.py", "MISTAKES", "CONTROLS")
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
        self.numbers = json.loads((DRAWN / "numbers.json").read_text(encoding="utf-8"))
        self.why = {name.replace(".", "-"): said for name, said in re.findall(
            r"(?m)^- `([\w.]+)`: (.*)$", read("page/why.md"))}

    def link_of(self, node: ast.AST) -> Link:
        """The links of the page, with the arguments of a function."""
        found = getattr(node, "args", None)
        named = [*found.args, *filter(None, [found.kwarg])] if found else []
        return Link(self.units, [argument.arg for argument in named])

    def heading(self, level: int, title: str, address: str, shown: str | None = None) -> None:
        self.level = level
        self.contents.append((level, address, shown or prose(title)))
        self.body.append(f'<h{level} id="{address}">{anchor(address)}{shown or prose(title)}'
                         f"</h{level}>")

    def two(self, said: str, done: str, address: str = "") -> None:
        """Two columns where there is room: what is said, and what belongs beside it."""
        self.body.append(f'<section class=unit{f" id={address}" if address else ""}>'
                         f"<div class=said>{said}</div><div class=done>{done}</div></section>")

    def statements(self, title: str, text: str) -> str:
        """What the map says about the equations of a heading, unless the comment there says it.

        The theorems of an equation that no function computes wait until that text is over."""
        shown = set().union(*(numbers(m[1]) for m in map(LABEL.search, text.splitlines()) if m))
        shown -= {13}  # of which a function has the logarithm
        found = ""
        for label, statement, functions, tests in self.rows:
            if not numbers(label) & numbers(title):
                continue
            if not numbers(label) <= shown and statement.startswith("$") and "`" in functions:
                found += (f"<div class=statement><span class=label>{inline(label)}</span><div class"
                          f'=formula><span>{tex(statement.strip("$"), True)}</span></div></div>')
            if "`" not in functions:
                self.waiting += re.findall(r"`(test_\w+)`", tests)
        return found

    def derivations(self, title: str) -> str:
        """The derivations of PAPER.md that belong to the equations of a heading."""
        return "".join(
            f"<details class=derivation open><summary>Derivation: {inline(name)}</summary><div "
            f'class=inside id="derivation-{slug(name)}">{markdown(text)}</div></details>'
            for name, text in re.findall(r"(?ms)^### (.*?)\n(.*?)(?=^### |\Z)",
                                         chapter("The derivations"))
            if min(numbers(name)) in numbers(title))

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
        listing = code(without_docstring(source, node), "code test")
        return (f"<details class=theorem><summary>Theorem: {prose(first, link)}</summary>"
                f'<div class=inside id="{name}">{document(rest, link)}<p class=file>'
                f"<code>{file}</code>: <code>pytest -k {name}</code></p>"
                f"{listing}{libraries(name)}</div></details>")

    def mistake(self, name: str) -> str:
        """A mistake: what one sees, right and wrong line, pictures, the failing test. Folded, but
        for those that one sees best."""
        self.left.discard(name)
        file, test, replacements, controls = self.mistakes[name]
        seen = "".join(self.seen(name, control) for control in controls.split())
        test = test.split(".")[1]
        target = f'<a href="#{test}"><code>{test}</code></a>' if test in self.shown else \
            f"<code>{test}</code>"
        title = f"Easy mistake: {prose(name, self.link)}"
        said = self.symptoms[name]
        said = said[0].upper() + said[1:] if said[1].islower() else said
        inside = (f"<p>{inline(said)}</p>"
                  f"{diff(whole_lines(file, replacements))}{seen}<p class=file>In "
                  f"<code>{file}</code>; noticed, among others, by {target}</p>")
        if name in SHOWN:
            return (f'<div class="mistake shown" id="mistake-{slug(name)}"><p><strong>{title}'
                    f"</strong></p>{inside}</div>")
        return (f"<details class=mistake><summary>{title}</summary><div class=inside "
                f'id="mistake-{slug(name)}">{inside}</div></details>')

    def seen(self, name: str, control: str) -> str:
        """The numbers, the pictures and the loss of the runs."""
        result = self.results[f"{control}/{name}"]
        right = self.results[result.get("beside", f"{control}/right")]  # run on the same machine
        figures = ""
        for one, kind in ((right, "right"), (result, "wrong")):
            if one["picture"]:
                picture = self.picture(KEPT / one["picture"])
                figures += (f"<figure class={kind}>" + crop(
                    picture, 0, 0, one["width"], one["height"], 3 * one["width"],
                    f"{control}, {name}: what comes with the {kind} line")
                    + f"<figcaption>{kind}</figcaption></figure>")
        if result["loss"] and right["loss"] and not result["text"].startswith("the same loss"):
            figures += plot({"right": right["loss"], "wrong": result["loss"]}, "step", "loss",
                            f"loss over steps: {name}")
        short = lambda text: re.sub(r"\d+\.\d{6}\b", lambda m: f"{float(m[0]):.3f}", text)
        pairs = [(a, b) if short(a) == short(b) else (short(a), short(b))
                 for a, b in result["printed"]]
        lines = diff(pairs) if pairs else ""
        same = lambda m: m[0] if short(m[1]) != short(m[2]) else "bits/dim the same to 0.001"
        result = {**result, "text": re.sub(r"bits/dim (\S+) instead of (\S+?)(?=;|$)", same,
                                           result["text"])}
        text = "" if lines and result["text"] == "nothing" else html.escape(short(result["text"]))
        if any(re.match(r" *\d+ +\d\.\d+ +\d", wrong) for _, wrong in pairs):
            text += " (lines of three numbers are rows of Table 4: steps, rate in bits/dim, RMSE)"
        return (f'<p class=numbers>Seen (<a href="#runs">{control}</a>) {text}</p>'
                f"{lines}<div class=seen>{figures}</div>")

    def picture(self, path: Path) -> str:
        """The name of a picture, which is in the page once however often it is shown."""
        name, content = f"picture-{path.stem}", path.read_bytes()
        width, height = struct.unpack(">II", content[16:24])
        self.pictures[name] = (f'<image id="{name}" width="{width}" height="{height}" href="data:'
                               f'image/png;base64,{base64.b64encode(content).decode()}"/>')
        return name

    def proofs(self, tests: dict[str, bool], mistakes: list[str]) -> str:
        """Theorems and mistakes in one line that opens; below it what one sees best.

        tests: each with whether it is shown here, or elsewhere."""
        theorems = "".join(self.theorem(test, here) for test, here in tests.items())
        folded = [self.mistake(m) for m in mistakes if m not in SHOWN]  # they name theorems
        count = lambda n, word: f"{n} {word}{'s' * (n != 1)}" if n else ""
        title = ", ".join(filter(None, (count(len(tests), "theorem"),
                                        count(len(folded), "easy mistake"))))
        fold = (f"<details class=proofs><summary>{title}</summary><div class=inside>{theorems}"
                f"{''.join(folded)}</div></details>") if title else ""
        return fold + "".join(self.mistake(m) for m in mistakes if m in SHOWN)

    def unit(self, source: str, node: ast.AST, file: str) -> None:
        """A function, a class or other lines: docstring beside code, theorems, mistakes."""
        name = node.name
        link, doc = self.link_of(node), ast.get_docstring(node) or ""
        why = f"<p class=why>{prose(self.why[self.units[name]])}</p>"
        listing = code(without_docstring(source, node))
        if name.startswith("_"):
            self.two("", f"<details class=helper><summary>Helper: <code>{name}</code></summary>"
                     f"<div class=inside>{why}{document(doc, link)}{listing}</div></details>",
                     self.units[name])
            return
        level = self.level + 1
        said = (f"<h{level} class=name>{anchor(self.units[name], name)}<code>{name}</code>"
                f"</h{level}>{why}{document(doc, link)}")
        if found := re.search(r"\[DDPM Alg\. (\d)\]", doc):
            said += (f"<div class=box><strong>Algorithm {found[1]}</strong>"
                     f"{markdown(self.algorithms[found[1]])}</div>")
        if name in BESIDE:
            said += getattr(self, BESIDE[name])()
        whole = "\n".join(source.splitlines()[node.lineno - 1:node.end_lineno])
        wrong = [m for m, (path, _, replacements, controls) in self.mistakes.items()
                 if path == file and controls and m in self.left and replacements[0][0] in whole]
        tests = [test for test, (path, line) in self.home.items() if path == file and line in whole]
        for _, _, functions, some in self.rows:
            if re.search(rf"`(\w+\.)?{name}`", functions):
                listed = re.findall(r"`(test_\w+)`", some)
                near = [t for t in listed if re.search(rf"\b{name}\b", ast.get_source_segment(
                    self.tests[t][1], self.tests[t][2]))]
                tests += near or listed
        here = {test: self.home.get(test, (file, whole)) for test in tests}
        here = {test: path == file and line in whole for test, (path, line) in here.items()}
        self.two(said, self.above + listing + self.proofs(here, wrong), self.units[name])
        self.above = ""

    def file(self, name: str, title: str, only: tuple = (), names: tuple = ()) -> None:
        """A source file in its own order; `only` some of its sections, or some functions."""
        source = read(name)
        parts = items(source)
        self.heading(2, title, slug(name), f"<code>{name}</code>: {title}")
        if not only and not names:
            said = document(ast.get_docstring(ast.parse(source)), self.link)
            self.two(said, self.symbols() if name == "ddpm.py" else "")
        if name == "train.py":
            self.two("<p>The settings of the paper's CIFAR-10 run, which are the defaults of "
                     "<code>python train.py</code>; a flag changes each of them. Warm-up and "
                     "gradient clipping are those of the released code.</p>"
                     + self.thirds(), settings())
        inside, due, said, plain = not only, "", "", []
        for kind, thing in [*parts, ("end", None)]:
            if kind == "banner" and thing[0] == "===":
                inside = not only or thing[1] in only
            if not inside and kind != "end" or names and getattr(thing, "name", "") not in names:
                continue
            if kind != "text" and due:  # below the text of the section
                beside = self.derivations(due) if name == "ddpm.py" else ""
                beside += self.proofs(dict.fromkeys(self.waiting, True), [])
                if said:
                    self.two(said, beside)
                self.above = "" if said else beside  # beside the statement of the function below
                self.waiting, due, said = [], "", ""
            if plain and (kind != "statement" or hasattr(thing, "name")):
                listing = code("\n".join(plain))
                self.two("", listing if "import" not in listing else "<details class=helper>"
                         f"<summary>Imports</summary><div class=inside>{listing}</div></details>")
                plain = []
            if kind == "banner":
                level, due = 3 if thing[0] == "===" else 4, thing[1]
                self.heading(level, due, slug(due))
                said = self.statements(due, section(source, thing)) if name == "ddpm.py" else ""
            elif kind == "text":
                said += document(thing, self.link)
            elif kind == "statement" and hasattr(thing, "name"):
                self.unit(source, thing, name)
                if thing.name == "p_sample_loop":
                    self.points()
            elif kind == "statement":
                plain.append(ast.get_source_segment(source, thing))

    # --- pictures -----------------------------------------------------------------------------

    def sheet(self, file: str, width: int, height: int, shown: int, label: str,
              heads: list = ()) -> str:
        """A picture of DRAWN, `shown` pixels wide, with a text above each column of 16 pixels."""
        name = self.picture(DRAWN / file)
        texts = "".join(f'<text x="{16 * i + 8}" y="-3" text-anchor=middle style="font-size:5px">'
                        f"{text}</text>" for i, text in enumerate(heads))
        full = height + (10 if heads else 0)
        return (f'<svg viewBox="0 {height - full} {width} {full}" width={shown} height='
                f'{round(shown * full / width)} role=img aria-label="{label}">{texts}<svg width='
                f'{width} height={height}><use href="#{name}"/></svg></svg>')

    def chain(self) -> str:
        """Figure 2, for the first screen."""
        heads = "0 100 200 300 500 1000 500 300 200 100 0".split()
        return "<figure>" + self.sheet(
            "chain.png", 176, 80, 880, "Five garments become noise from the left to the middle, "
            "and five others come out of it to the right", heads) + (
            "<figcaption>The chain (the paper's Figure 2) with the t of each column: a garment "
            f"{formula('x_0')} becomes noise by the steps of Eq. 2, and from that noise Algorithm "
            "2 draws another one.</figcaption></figure>")

    def demo(self) -> str:
        """The first screen: for page/demo.js each wrong line with its settings; without it, and on
        paper, a picture."""
        name = self.picture(DRAWN / "demo.png")
        panels = "".join(
            f"<figure>{crop(name, 120 * i, 0, 120, 120, 150, f'400 points: {what}', 'panel')}"
            f"<figcaption>{prose(what)}</figcaption></figure>"
            for i, what in enumerate(("right", *STILL)))
        link = lambda place, what: f'<a href="#{place}">{prose(what)}</a>'
        wrong = ""
        for key, (what, place, replacements, chosen, seen) in DEMO.items():
            if not place:
                place, replacements = f"mistake-{slug(what)}", self.mistakes[what][2]
            wrong += (f"<div data-mistake={key} data-set='{json.dumps(chosen)}'><p>"
                      f"{link(place, what)}: {prose(seen)}</p>"
                      f"{diff(whole_lines('ddpm.py', replacements))}</div>")
        for kind, beta in (("fixed_small", "β̃_t"), ("fixed_large", "β_t")):
            wrong += f"<span data-variance={kind}>{formula(f'σ_t² = {beta}')}</span>"
        unseen = " and ".join(link(f"mistake-{slug(what)}", what.replace(
            "divided by ᾱ_t", "without its root")) for what in UNSEEN)
        return (
            f"<section id=demo><h2>{anchor('demo')}Break it yourself</h2>"
            "<p>Algorithm 2 draws 400 points from noise, with the right lines and with a wrong "
            "one. The data are 64 narrow Gaussians along a spiral. The best "
            f"{formula('ε_θ')} for them is known, so what you see comes from the sampler alone.</p>"
            f"<figure class=still><div class=row>{panels}</div><figcaption>Points that Algorithm 2 "
            "has drawn with the right lines, and with three wrong ones.</figcaption></figure>"
            f"<div hidden>{wrong}</div><p class=unseen>Points do not show everything: {unseen} "
            "hardly change them, but change pictures. Mistakes in training, in the network and in "
            'the data are listed <a href="#symptoms">by what you see</a>.</p></section>')

    def jump_text(self) -> str:
        """Two garments at the time of a slider."""
        rows = [(what, 16 * i) for i, what in enumerate(("x_t", "ε", "ε_θ(x_t, t)", "x̂_0"))]
        name, start = self.picture(DRAWN / "forward.png"), 6
        pictures = "".join(
            "<figure>" + "".join(crop(name, 16 * start, y + 64 * k, 16, 16, 80,
                                      f"{what} of garment {k + 1} at the time of the slider",
                                      "frame") for k in (0, 1))
            + f"<figcaption>{formula(what)}</figcaption></figure>" for what, y in rows)
        times = json.dumps([f"t = {t}" for t in self.numbers["times"]])
        return (f"<figure data-frames='{times}' data-label=time data-start={start}><div class=row>"
                f"{pictures}</div><figcaption>Two garments (without the slider: at t = 300), "
                "with the noise in them, what a network takes for it, and the estimate of Eq. 15, "
                "clipped. "
                f"{formula('ε')} and {formula('ε_θ')} are shown a third as strong as they are."
                f"</figcaption></figure>{self.jump()}")

    def jump(self) -> str:
        """One garment at t = 0, 100 … 1000 over the two coefficients of Eq. 4."""
        name, bars = self.picture(DRAWN / "forward.png"), self.numbers["alpha_bars"]
        curves = {"√ᾱ_t": [(20 * i, math.sqrt(bar)) for i, bar in enumerate(bars)],
                  "√(1 − ᾱ_t)": [(20 * i, math.sqrt(1 - bar)) for i, bar in enumerate(bars)]}
        return plot(curves, "t", "", "the coefficients of Eq. 4 over t, and a garment at eleven "
                    "times", log=False, width=520, strip=lambda x, y: "".join(
                        f'<svg x="{x(100 * i) - 20:.0f}" y="{y}" width=40 height=40 viewBox='
                        f'"{32 * i} 0 16 16"><use href="#{name}"/></svg>' for i in range(11)))

    def terms(self) -> str:
        """Where the bits of the bound lie."""
        some, L_T = self.numbers["terms"], self.numbers["L_T"]
        return plot({"L_{t−1}": some}, "t", "bits/dim", "each term of the bound over t") + (
            f"<p class=numbers>Where the bits lie: {formula('L_{t−1}')} of a network that was "
            f"trained on garments, for 32 test images. The first term, {formula('L_0')}, is the "
            f"largest, {some[0][1]:.2f} bits/dim; {formula('L_T')} is {1e5 * L_T:.0f} · 10⁻⁵.</p>")

    def thirds(self) -> str:
        """The loss by thirds of t."""
        lines = {what: [(row[0], row[i]) for row in self.numbers["loss"] if row[i]]
                 for i, what in enumerate(("t ≤ T/3", "T/3 < t ≤ 2T/3", "t > 2T/3"), 1)}
        return plot(lines, "step", "loss", "the loss of each third of t over the steps") + (
            "<p class=numbers>The loss of each third of t in the run that made the pictures of "
            "this page: at small t there is little noise in the image to be seen, and the error is "
            "largest.</p>")

    def beginnings(self) -> str:
        """The same as `files`, without the slider."""
        labels = [*map(str, self.numbers["cuts"]), "all"]
        return ("<figure>" + self.sheet("files.png", 144, 64, 576, "Four garments from the first "
                "bytes of their files", labels) + "<figcaption>Four test images from the first 16, "
                "24, 32 … bytes of their files: the last ones change nothing that one sees."
                "</figcaption></figure>")

    def files(self) -> str:
        """Pictures from the first bytes of their files."""
        labels = [*map(str, self.numbers["cuts"]), "all"]
        name, last = self.picture(DRAWN / "files.png"), len(labels) - 1
        frames = "".join(crop(name, 16 * last, 16 * k, 16, 16, 96, f"picture {k + 1} from the "
                              "bytes of the slider", "frame") for k in range(4))
        said = json.dumps([f"{label} bytes" for label in labels])
        strip = self.sheet("files.png", 144, 64, 576, "Four garments from ever more bytes", labels)
        return (f"<figure data-frames='{said}' data-label='first bytes' data-start={last}>{strip}"
                f"<div class=row>{frames}</div><figcaption>Four test images from the first 16, 24, "
                "32 … bytes of files that <code>extras/compress.py</code> wrote; a whole file has "
                f"{sum(self.numbers['bytes']) / 4:.0f} bytes on average (this network has "
                "learned longer than that of the mistakes), and gives the picture "
                "back exactly.</figcaption></figure>")

    def over_time(self) -> str:
        """Figure 6."""
        return "<figure>" + self.sheet(
            "progress.png", 192, 64, 576, "The estimate of the sample from early to late", [
                *(round(1000 - 99.9 * i) for i in range(11)), 0]) + (
            f"<figcaption>{formula('x̂_0')} while Algorithm 2 runs (the paper's Figure 6), with "
            "the t of each column: the large things are decided first.</figcaption></figure>")

    def points(self) -> None:
        """Algorithm 2 and DDIM on points, where the best network is known."""
        name = self.picture(DRAWN / "paths.png")
        samplers, steps = ("β_t", "β̃_t", "η = 0.5", "η = 0"), self.numbers["steps"]
        panels = "".join(
            f"<tr><th scope=row>{n} calls</th>" + "".join(
                f"<td>{crop(name, 120 * j, 120 * i, 120, 120, 132, f'{who}, {n} calls', 'panel')}"
                "</td>" for j, who in enumerate(samplers)) + "</tr>" for i, n in enumerate(steps))
        head = "".join(f"<td>{formula(what if 'η' in what else f'σ_t² = {what}')}</td>"
                       for what in samplers)
        self.heading(self.level, "What σ_t² does", "points-in-two-dimensions")
        self.two(
            f"<p>400 points, drawn with the best {formula('ε_θ')} there is: the data are 64 narrow "
            f"Gaussians along a spiral, so that {formula('E[ε | x_t]')} is known, and every "
            "difference comes from the sampler. (η is DDIM's, of Song et al. 2021, and fewer calls "
            "are those of <code>respace</code>; both stand further below.) With 1,000 calls all of "
            "them find the spiral. With "
            f"50 calls, {formula('σ_t² = β_t')} leaves noise: the median distance to the spiral is "
            f"0.054, and 0.023 with the others. {formula('β_t')} is the right variance for data "
            f"that are noise themselves, as {formula('β̃_t')} is for a single point. "
            "With 10 calls none of them finds the spiral. "
            f"{formula('β_t')} leaves far too much noise, and the others draw the points to the "
            "middle (their root mean square is 0.33, 0.36 and 0.38, and that of the data 0.54), "
            "the less so, the less noise they add.</p>"
            '<p class=only-screen>The <a href="#demo">first screen</a> draws such points while you '
            "watch, with these samplers and others.</p>",
            wide(f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{panels}</tbody></table>"))

    # --- the other parts ----------------------------------------------------------------------

    def symbols(self) -> str:
        """The definitions of the symbols, to which `linked` leads."""
        self.known = {}
        rows = ""
        for symbol, what, where in table("Symbols"):
            markup = tex(symbol.strip("$"))
            text, base = re.sub("<.*?>", "", markup), base_of(markup)
            key = "L_" if text == "L" else base  # L_T and L_{t−1} are its terms
            if not key or "θ" in text or "0" in text or text in ("xt", "Lsimple"):
                key = text
            address = "sym-" + slug(re.sub(r"\\(text)?", " ", symbol))
            said = f"{what} ({where})"
            self.known[key] = self.known[text] = (address, unicode(said))
            rows += f'<dt id="{address}">{markup}</dt><dd>{inline(said)}</dd>'
        data = html.escape(json.dumps(self.known, ensure_ascii=False), quote=True)
        return (f'<h3 id=symbols data-symbols="{data}">{anchor("symbols")}Symbols</h3>'
                f"<dl>{rows}</dl>")

    def linked(self, body: str) -> str:
        """Symbols that stand alone in the text lead to their definitions, once a paragraph."""
        def paragraph(found: re.Match) -> str:
            seen = set()

            def one(match: re.Match) -> str:
                text = re.sub("<.*?>", "", match[1])
                entry = self.known.get(text) or self.known.get(base_of(match[1]))
                if not entry or entry in seen:
                    return match[0]
                seen.add(entry)
                return (f'<a class=sym href="#{entry[0]}" aria-label="{text}" data-tip="'
                        f'{html.escape(entry[1])}">{match[0]}</a>')
            parts = re.split(r"(<a .*?</a>|<summary>.*?</summary>)", found[0])
            parts[::2] = [re.sub(r"<math>(?:<mrow>)*(<(msub|msup|msubsup|mi)>(?:(?!</math>).)*?"
                                 r"</\2>)(?:</mrow>)*</math>", one, part) for part in parts[::2]]
            return "".join(parts)
        return re.sub(r"(?s)<(p|li|dd)>.*?</\1>", paragraph, body)

    def helpers(self) -> None:
        """The tests that a link named and no function has shown, and what the theorems share."""
        self.heading(2, "What the theorems share", "helpers")
        source = read("test_ddpm.py")
        tree, lines = ast.parse(source), source.splitlines()
        shared = ["\n".join(lines[first_line(node) - 1:node.end_lineno]) for node in tree.body[1:]
                  if not getattr(node, "name", "").startswith("test_")]
        self.two(document(ast.get_docstring(tree), self.link),
                 "<details class=helpers><summary>The helpers of <code>test_ddpm.py</code>"
                 f"</summary>{code(chr(10).join(shared), 'code test')}</details>"
                 + "".join(self.theorem(test) for test in sorted(self.named - self.shown)))

    def runs(self) -> None:
        """How the mistakes were run: PAPER.md's text, and the commands of each control."""
        self.heading(2, "How the mistakes were run", "runs")
        said = chapter("Easy mistakes").split("\n| ")[0]
        rows = "".join(f"<dt>{name}</dt><dd>" + "<br>".join(
            f"<code>{html.escape(line)}</code>" for line in lines) + "</dd>"
            for name, lines in self.controls.items())
        self.two(markdown(said[said.index("**The runs.**"):]),
                 "<details class=helpers open><summary>The commands: TREE is the program, right or "
                 "wrong, SHARED the network of the right lines, TRAIN and TEST the images"
                 f"</summary><dl>{rows}</dl></details>")

    def questions(self) -> None:
        """Ten questions with their answers, from docs/questions.md."""
        self.heading(2, "Ten questions", "questions")
        self.body.append("<div class=cards>")
        for title, text in re.findall(r"(?ms)^## (.*?\?)\n\n(.*?)(?=^## |\Z)",
                                      read("docs/questions.md")):
            address = f"question-{slug(title)}"
            self.body.append(f"<section><h3 id={address}>{anchor(address)}{inline(title)}</h3>"
                             f"{self.illustrated(text)}</section>")
        self.body.append("</div>")

    def illustrated(self, text: str) -> str:
        """HTML of a text with pictures: `<img …>`, and `<!-- name -->` for a method's plot."""
        made: list[str] = []

        def one(found: re.Match) -> str:
            if found[4]:
                made.append(getattr(self, found[4])())
            else:
                path = DRAWN / found[1]
                width, height = struct.unpack(">II", path.read_bytes()[16:24])
                made.append(crop(self.picture(path), 0, 0, width, height, int(found[2]), found[3]))
            return f"picture{len(made) - 1}here"
        text = re.sub(r'<img src="\.\./page/images/(\S+)" width="(\d+)" alt="([^"]*)">'
                      r"|<!-- (\w+) -->", one, text)
        found = re.sub(r"<p>(picture\d+here)</p>", r"\1", markdown(text))
        return re.sub(r"picture(\d+)here", lambda m: made[int(m[1])], found)

    def seen_first(self) -> None:
        """The symptoms, with links to the mistakes that look so."""
        self.heading(2, "My samples look wrong", "symptoms")
        rows = ""
        for what, names, met in table("Symptoms"):
            names = names.split("; ")
            runs = (self.results[f"{control}/{name}"] for name in names if name in self.mistakes
                    for control in self.mistakes[name][3].split())
            picture = "" if re.search("loss|bits|nothing", what) else next(  # no number has one
                (crop(self.picture(KEPT / one["picture"]), 0, 0, 64, 64, 96, what)
                 for one in runs if one["picture"]), "")
            if what.startswith("noise remains"):  # seen in a run without a wrong line
                noisy = self.picture(DRAWN / "questions" / "large-50.png")
                picture = crop(noisy, 0, 0, 64, 64, 96, what)
            causes = "; ".join(cause(name) if name in self.mistakes else prose(name)
                               for name in names)
            rows += (f"<tr><td>{prose(what)}</td><td>{picture}</td><td>{causes}</td>"
                     f"<td>{inline(met)}</td></tr>")
        said = re.sub("</?a.*?>", "", markdown(chapter("Symptoms").split("\n| ")[0]))
        self.body.append(f"<div class=prose>{said}</div>" + wide(
            "<table class=symptoms><thead><tr><th>what you see</th><th>such as</th>"
            "<th>what it may be</th><th>met by others</th>"
            f"</tr></thead><tbody>{rows}</tbody></table>"))

    def exercises(self) -> None:
        """Four lines of a wrong program and what comes of them: which one is wrong?"""
        self.heading(2, "Find the wrong line", "exercises")
        self.body.append(
            "<div class=prose><p>Ten times the program was run with one wrong line. "
            "It stands among the four that you see, and no comment helps. The pictures are 16 "
            "samples, with the right lines and with the wrong one.</p></div><div class=cards>")
        for number, name in enumerate(EXERCISES, 1):
            file, _, ((right, wrong),), controls = self.mistakes[name]
            lines, place = four(file, right, wrong, number)
            control = controls.split()[0]
            runs = [self.results[f"{control}/{one}"] for one in ("right", name)]
            pictures = "".join(
                f"<figure>{crop(self.picture(KEPT / run['picture']), 0, 0, 64, 64, 128, label)}"
                f"<figcaption>{what}</figcaption></figure>" for run, what, label in zip(
                    runs, ("right", "wrong"), (f"exercise {number}: samples of the right program",
                                               f"exercise {number}: samples of the wrong one")))
            listing = code("\n".join(f"{i}  {line}" for i, line in enumerate(lines, 1)),
                           "code four")
            self.body.append(
                f"<section><h3 id=exercise-{number}>{anchor(f'exercise-{number}')}"
                f"Exercise {number}</h3><div class=row>{pictures}</div>{listing}"
                f"<details><summary>Which line is wrong?</summary>"
                f"<p>Line {place}: {prose(name)}.</p>{diff(whole_lines(file, [(right, wrong)]))}"
                f'<p><a href="#mistake-{slug(name)}">What else was seen</a></p>'
                "</details></section>")
        self.body.append("</div>")

    def history(self) -> None:
        """A short history, and the references."""
        self.heading(2, "History and references", "history")
        said = read("docs/history.md").split("\n", 2)[2]
        self.body.append(re.sub(r"<h2>(.*?)</h2>", lambda m: f"<h3 id={slug(m[1])}>"
                                f"{anchor(slug(m[1]))}{m[1]}</h3>", markdown(said)))

    def judged(self) -> None:
        """Your own implementation and four libraries, judged."""
        self.heading(2, "Check your own", "judge")
        self.two(
            "<p>The statements of the paper can judge any implementation: fill in "
            "this file, and run <code>python -m judge my_ddpm.py"
            "</code>. Without a file it prints the interface.</p>",
            f"<details class=helpers><summary>The file to fill in</summary>"
            f"{code(read('judge/template.py'), 'code test')}</details>")
        text = re.sub("<td>([^<]*)</td>", lambda m: f"<td>{prose(html.unescape(m[1]))}</td>",
                      markdown(chapter("Four libraries, judged")))
        text = re.sub(r"(?<!\w)(\w[\u0300-\u036f]?)_(\w)(?!\w)", r"\1<sub>\2</sub>", text)
        while "_{" in text:  # from the inside out
            text = re.sub(r"_\{([^{}]*)\}", r"<sub>\1</sub>", text)
        self.body.append(text)

    def others(self) -> None:
        """The mistakes in files that are not on this page."""
        self.heading(2, "Mistakes in other files", "elsewhere")
        self.body.append("<div class=done>" + "".join(
            self.mistake(name) for name in self.mistakes if name in self.left) + "</div>")

    def place(self, found: re.Match) -> str:
        """A link from one document to another, as one to a place of the page, if it is there."""
        said, plain = found[2], re.sub("<.*?>", "", found[2])
        titles = {address: re.sub("<.*?>", "", title) for _, address, title in self.contents}
        if found[1].startswith("mistakes.md"):
            return f'<a href="#runs">{said}</a>'
        first = next((address for address, title in titles.items()
                      if numbers(plain) & numbers(title)
                      or re.match(r"Alg|§", plain) and title.startswith(plain)), None)
        first = self.link(plain) or first or ("2-background" if plain == "Eq. 1" else None)
        return f'<a href="#{first}">{said}</a>' if first else said

    def table_of_contents(self) -> str:
        """Nested lists of links."""
        out, depth = "<ul>", 2
        for i, (level, address, title) in enumerate(self.contents):
            out += "<ul>" * (level - depth) + "</li></ul>" * (depth - level) + (
                "</li>" if i and level <= depth else "")
            out += (f'<li><a href="#{address}" aria-label="{re.sub("<.*?>", "", title)}">{title}'
                    "</a>")
            depth = level
        return out + "</li></ul>" * (depth - 1)

SHOWN = ("T changed, β not rescaled", "1 − ᾱ_t instead of its root in Eq. 4",  # the best to see
         "√ᾱ_t instead of √α_t in Eq. 7", "Eq. 15 divided by ᾱ_t", "σ_t² instead of σ_t",
         "the network given i instead of τ_i")
# For page/demo.js: the mistake; its place and lines, if page/mistakes.py has none; the settings in
# which it shows, where they are not 100 of T = 1000 steps and σ_t² = β̃_t; and what one sees.
DEMO = {
    "square": ("σ_t² instead of σ_t", "", [], {},
               "too little noise in every step, and the points gather in the innermost turn."),
    "no-z": ("z = 0 in every step", "p_sample_loop", [
        ("noise(t) if t > 1 else torch.zeros_like(x_t)", "torch.zeros_like(x_t)")], {},
        "without noise all points go to the same place."),
    "last": ("noise at the last step", "", [], {"T": 50, "steps": 50},
             "the spiral is blurred, and the more so, the smaller T is."),
    "early": ("a loop that ends at t = 2", "", [], {"T": 50, "steps": 50},
              "what is shown is x_1, with its noise."),
    "plus": ("+ε instead of −ε in Eq. 15", "predict_x0_from_eps", [
        ("(x_t - _like((1 - alpha_bar).sqrt(), x_t) * eps) /",
         "(x_t + _like((1 - alpha_bar).sqrt(), x_t) * eps) /")], {},
        "each step goes the wrong way, and the points leave the picture."),
    "eq7": ("√ᾱ_t instead of √α_t in Eq. 7", "", [], {"steps": 1000},
            "every step shrinks x_t too much, and the outer turns stay empty."),
    "eq11": ("√ᾱ_t instead of √α_t in Eq. 11", "", [], {},
             "every step divides by a number that is too small, and the points leave the picture."),
    "full-beta": ("β_t of the full schedule with fewer steps", "", [], {"steps": 50},
                  "each step adds x̂_0 with the small weight of one step of many, and all points "
                  "end near the middle."),
    "time": ("the network given i instead of τ_i", "", [], {"steps": 50},
             "the network takes the points for less noisy than they are; they end scattered, most "
             "of them about the outer turns."),
    "ddim": ("DDIM's noise and direction not balanced", "", [],
             {"steps": 50, "sampler": "ddim", "eta": 0.5},
             "too much noise is left in every step, and the inner turns stay empty."),
}
STILL = ("σ_t² instead of σ_t", "√ᾱ_t instead of √α_t in Eq. 7",  # in demo.png of page/figures.py
         "the network given i instead of τ_i")
UNSEEN = ("Eq. 15 divided by ᾱ_t", "T changed, β not rescaled")
EXERCISES = (  # ten that show in a picture, the easy ones first
    "images in [0, 1]", "1 − ᾱ_t instead of its root in Eq. 4", "Eq. 15 divided by ᾱ_t",
    "ᾱ_t as a product up to T", "√ᾱ_t instead of √α_t in Eq. 7", "σ_t² instead of σ_t",
    "zeros left and above when down-sampling", "decay and 1 − decay exchanged",
    "the network given i instead of τ_i", "DDIM's noise and direction not balanced")
BESIDE = {"q_sample": "jump_text", "vlb_term": "terms", "p_sample_loop": "over_time",
          "receive": "files"}

def base_of(markup: str) -> str:
    """What has an index or exponent, and a stroke for it: "α¯_" for ᾱ_t and for ᾱ_{t−1}."""
    found = re.search(r"<m(?:sub|sup|subsup)>(<(\w+)\b.*?</\2>)", markup)
    return re.sub("<.*?>", "", found[1]) + "_" if found else ""

def four(file: str, right: str, wrong: str, number: int) -> tuple[list[str], int]:
    """Four lines of code with the wrong one among them, and its place from 1 on.

    Docstrings, comments and empty lines are left out; a short function is followed by the next one.
    """
    source = read(file)
    place = source[:source.index(right)].count("\n") + 1
    tree, said = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            said |= set(range(node.lineno, node.end_lineno + 1))
    kept = [i for i, line in enumerate(source.splitlines(), 1)
            if line.strip() and not line.lstrip().startswith("#") and i not in said]
    inner = max((node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
                 and node.lineno <= place <= node.end_lineno), key=lambda node: node.lineno)
    own = [k for k, i in enumerate(kept) if inner.lineno <= i <= inner.end_lineno]
    k = kept.index(place)
    start = max(k - 7 * number % 4, own[0])
    lines = source.replace(right, wrong).splitlines()
    shown = "\n".join(lines[i - 1] for i in kept[start:start + 4])
    return textwrap.dedent(shown).splitlines(), k - start + 1

PLAIN = {r"\tilde\beta": "β̃", r"\bar\alpha": "ᾱ", r"\mathcal N": "N", r"\mid": "|", r"\cdot": "·",
         r"\infty": "∞", r"\alpha": "α", r"\beta": "β", r"\delta": "δ", r"\epsilon": "ε",
         r"\theta": "θ", r"\sigma": "σ", "^2": "²", "-": "−"}

def unicode(text: str) -> str:
    """A text with simple formulas in TeX as one with formulas in Unicode, for tips."""
    def one(found: re.Match) -> str:
        return functools.reduce(lambda said, pair: said.replace(*pair), PLAIN.items(), found[1])
    return re.sub(r"\$(.*?)\$", one, text)

def tables(file: str, *names: str) -> list:
    """Tables of a file that imports torch, without the rest of it."""
    space: dict = {}
    for node in ast.parse(read(file)).body:
        if isinstance(node, ast.Assign) and not ast.unparse(node).startswith(("ROOT", "KEPT")):
            exec(compile(ast.Module([node], []), file, "exec"), space)
    return [space[name] for name in names]

def settings() -> str:
    """The paper's settings: name, default and meaning, from the table of train.py."""
    source, rows = read("train.py"), ""
    table = next(node for node in ast.parse(source).body if isinstance(node, ast.Assign)
                 and ast.unparse(node.targets[0]) == "SETTINGS").value
    for key, value in zip(table.keys, table.values):
        default, meaning = ast.literal_eval(value.elts[0]), value.elts[2]
        if key.value == "seed":
            break  # what follows is no part of the model
        if default is not None and isinstance(meaning, ast.Constant):
            rows += (f"<tr><td><code>{key.value}</code></td><td>{html.escape(str(default))}</td>"
                     f"<td>{prose(meaning.value)}</td></tr>")
    return wide("<table><thead><tr><th>setting</th><th>value</th><th>meaning</th></tr></thead>"
                f"<tbody>{rows}</tbody></table>")

def cause(name: str) -> str:
    """A link to a mistake; one that is a formula alone would have no name for who listens."""
    said = prose(name)
    said = said if re.sub("<math>.*?</math>|<.*?>", "", said).strip() else f"with {said}"
    return f'<a href="#mistake-{slug(name)}">{said}</a>'

def anchor(address: str, name: str = "this section") -> str:
    """The link of a heading to itself."""
    return f'<a class=anchor href="#{address}" aria-label="Link to {name}">#</a>'

def crop(name: str, x: float, y: float, width: float, height: float, shown: int, label: str,
         kind: str = "") -> str:
    """A part of a picture, `shown` pixels wide."""
    return (f'<svg{f" class={kind}" if kind else ""} viewBox="{x} {y} {width} {height}" '
            f"width={shown} height={round(shown * height / width)} role=img aria-label="
            f'"{html.escape(label)}">'
            f'<use href="#{name}"/></svg>')

def plot(lines: dict, across: str, up: str, label: str, log: bool = True, width: int = 300,
         strip=None) -> str:
    """Curves with ticks; log: both axes are logarithmic; strip(x, y): what stands below them."""
    f = (lambda v: math.log10(max(v, 1e-9))) if log else float
    every = [(f(x), f(y)) for points in lines.values() for x, y in points]
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*every))
    height, foot = 0.55 * width, 44 if strip else 0
    X = lambda v: 34 + (width - 60) * (v - x0) / (x1 - x0 or 1)
    Y = lambda v: height - 22 - (height - 34) * (v - y0) / (y1 - y0 or 1)

    def ticks(low: float, high: float, most: int) -> list:
        if not log:
            step = next(s for s in (0.2, 0.5, 1, 10, 100, 1000) if (high - low) / s <= most)
            return [(v * step, f"{v * step:g}") for v in range(round(high / step) + 1)]
        some = [(math.log10(m) + e, f"{m * 10.0 ** e:g}" if e > -3 else
                 f"{m} · 10{raised(e)}".removeprefix("1 · "))
                for e in range(-9, 8) for m in ((1,) if high - low > 3 else (1, 2, 5))]
        some = [tick for tick in some if low - 1e-9 <= tick[0] <= high + 1e-9]
        return some[::max(1, math.ceil(len(some) / most))]
    out = "".join(f'<path class=axis d="M{X(v):.1f} {height - 22}v4"/><text x="{X(v):.1f}" '
                  f'y="{height - 9}" text-anchor=middle>{text}</text>'
                  for v, text in ticks(x0, x1, 10 if not log else 5))
    out += "".join(f'<path class=axis d="M30 {Y(v):.1f}h4"/><text x=28 y="{Y(v) + 3:.1f}" '
                   f"text-anchor=end>{text}</text>" for v, text in ticks(y0, y1, 4))
    out += f'<path class=axis d="M34 6V{height - 22}H{width - 20}"/>'
    for i, (name, points) in enumerate(lines.items()):
        kind = name if name in ("right", "wrong") else f"c{i}"
        out += (f'<polyline class={kind} points="' + " ".join(
            f"{X(f(x)):.1f},{Y(f(y)):.1f}" for x, y in points) + '"/>')
    if "right" in lines:
        said = "right: solid; wrong: dashed"
    elif len(lines) > 1:
        said = "; ".join(f"{key}: {formula(name)}" for key, name in zip(KEYS, lines))
    else:
        said = formula(*lines)
    axes = f"{up} over {across}" if up else f"over {formula(across)}"
    out += strip(X, round(height)) if strip else ""
    full = height + foot
    return (f'<figure class=plot><svg viewBox="0 0 {width} {full:.0f}" width={round(1.4 * width)} '
            f'height={round(1.4 * full)} role=img aria-label="{html.escape(label)}">{out}</svg>'
            f"<figcaption>{said} ({axes}{', logarithmic' if log else ''})</figcaption></figure>")

def raised(number: int) -> str:
    """A number as a superscript."""
    digits = {v: k for k, v in SUPER.items()}
    return "".join(digits[c] for c in f"{number}".replace("-", "−"))

KEYS = ("solid", "dashed", "dotted")

def libraries(theorem: str) -> str:
    """In which libraries all the judge's statements of the same equation hold, some, or none."""
    number, found = theorem.split("_")[1], {}
    for judged in json.loads(read("judge/libraries/matrix.json"))["libraries"].values():
        verdicts = {row["verdict"] for name, row in judged["theorems"].items()
                    if name.split("_")[0] == number} - {"not offered"}
        if verdicts:
            word = "holds in part" if len(verdicts) > 1 else {
                "holds": "holds", "fails": "differs"}[verdicts.pop()]
            found.setdefault(word, []).append(judged["package"])
    said = [f"{word} in {', '.join(names)}" for word, names in found.items()]
    judged = '<a href="#judge">judged</a>'
    return f"<p class=file>As {judged}, the equation {'; '.join(said)}.</p>" if said else ""

def build(repository: str = "") -> str:
    """The page; repository: its address, to which the page then links."""
    page = Page()
    chain, demo = page.chain(), page.demo()
    for name in ("ddpm.py", "train.py", "support/data.py", "unet.py"):
        for node in ast.parse(read(name)).body:
            if hasattr(node, "name"):
                prefix = "" if name == "ddpm.py" else f"{Path(name).stem}-"
                page.units.setdefault(node.name, prefix + node.name)
    page.body.append("<div class=only-screen>")
    page.questions()
    page.seen_first()
    page.exercises()
    page.body.append("</div>")
    page.file("ddpm.py", "the mathematics")
    page.file("train.py", "training", only=("Algorithm 1", "Its parts"))
    page.file("support/data.py", "scaling (§3.3)", names=("to_model", "to_uint8"))
    page.file("unet.py", "the network")
    page.body.append("<div class=only-screen>")
    page.history()
    page.judged()
    page.runs()
    page.others()
    page.helpers()
    page.body.append("</div>")
    face = lambda family, file, more="": (
        f'@font-face {{ font-family: "DDPM {family}"; {more}src: url(data:font/woff2;base64,'
        + base64.b64encode((HERE / "fonts" / f"{file}.woff2").read_bytes()).decode()
        + ') format("woff2"); }')
    fonts = "\n".join((face("Math", "math"), face("Text", "regular"),
                       face("Text", "italic", "font-style: italic; "),
                       face("Text", "bold", "font-weight: bold; ")))
    body = re.sub(r"(<math\b(?:(?!</math>).)*</math>)([.,;:?)]+)",  # no line begins with a stop
                  r"<span class=nb>\1\2</span>", page.linked("\n".join(page.body)))
    body = re.sub(r'<a href="([^"#]*\.(?:md|py)(?:#[^"]*)?)">(.*?)</a>', page.place, body)
    body = re.sub(r"\s*\((?:derived in|see) PAPER\.md\)", "", body)  # it stands here
    run = re.search(r"(?s)```sh\n(.*?)```", read("README.md"))[1]
    preview = ('\n<meta property=og:image content="'
               f'{repository}/raw/main/.github/images/fashion.png">')
    return string.Template((HERE / "page.html").read_text(encoding="utf-8")).substitute(
        style=(HERE / "page.css").read_text(encoding="utf-8").replace("FONTS", fonts),
        script=read("page/page.js") + read("page/demo.js"), demo=demo,
        contents=page.table_of_contents(), body=body, pictures="".join(page.pictures.values()),
        paper=inline(read("PAPER.md").splitlines()[2]), chain=chain,
        run=f"<h2 id=run>{anchor('run')}Run it</h2><pre>{html.escape(run.strip())}</pre>",
        steps=f'{page.numbers["loss"][-1][0]:,}', preview=preview if repository else "",
        repository=f' <a href="{repository}">The repository.</a>' if repository else "")

def main(argv=None) -> int:
    """Writes the page: see the text at the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("site/index.html"),
                        help="(default: site/index.html)")
    parser.add_argument("--repository", default="", help="address to which the page links")
    args = parser.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text := build(args.repository), encoding="utf-8")
    print(f"{args.out}: {len(text.encode()) / 1000:.0f} kB")
    return 0

if __name__ == "__main__":
    sys.exit(main())
