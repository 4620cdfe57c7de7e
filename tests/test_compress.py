"""Algorithms 3 and 4 with real bits: the arithmetic code, the chosen candidate, whole files."""
import base64
import itertools
import math
import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

import ddpm
from extras import compress
from helpers import cells, flags_of, HERE, hooked, random_run, read_png
from support import checkpoint, data
from support.checkpoint import Trained
from unet import build_network, UNet

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


# --- the arithmetic code

laws = st.lists(st.floats(0, 1), min_size=2, max_size=9).filter(lambda p: sum(p) > 1e-9).map(
    lambda p: compress.frequencies(torch.tensor(p, dtype=torch.float64)).tolist())
messages = st.lists(laws.flatmap(lambda law: st.tuples(
    st.just(law), st.integers(0, len(law) - 1))), max_size=30)


@given(messages)
def test_code_length_is_that_of_the_probabilities(message):
    """8 · bytes ≤ Σ −log₂ p + 1, rounded up to whole bytes, for any list of probabilities; the
    symbols come back, and the first bytes give the first symbols and then no wrong one. A symbol
    costs the same time wherever it stands, for the integers keep their length.

    Kills: an interval of all symbols, which makes writing quadratic; a lost carry; parts of the
    interval given up."""
    code, ideal = compress.Code(), 0.0
    for law, symbol in message:
        assert sum(law) == 2 ** 16 and min(law) > 0
        assert code(law, symbol) == symbol
        assert code.low < 2 ** 128 and 2 ** 120 <= code.width <= 2 ** 128
        ideal -= math.log2(law[symbol] / 2 ** 16)
    content = code.to_bytes()
    assert len(content) <= math.ceil((ideal + 1 + 1e-9) / 8)
    for n in {0, len(content) // 2, len(content) - 1, len(content)} - {-1}:
        code, found = compress.Code(content[:n]), []
        try:
            for law, _ in message:
                found.append(code(law))
        except EOFError:
            assert n < len(content)
        assert found == [symbol for _, symbol in message][:len(found)]
        assert n < len(content) or code.to_bytes() == content


@pytest.mark.parametrize("after", [None, 0, 2])
@pytest.mark.parametrize("n", [1, 8, 9, 100, 4000])
def test_a_code_may_stay_on_both_sides_of_a_number(n, after):
    """The middle 2 of 2^16, n times, is an interval around 1/2, and no byte of it is known, since a carry
    may still come: a symbol at one side then decides all of them. Nothing is lost by that.

    Kills: a side of the interval given up, 1/5 bit a symbol; a carry that stops at the last byte."""
    law, code = [2 ** 15 - 1, 2, 2 ** 15 - 1], compress.Code()
    symbols = [1] * n + ([] if after is None else [after])
    assert [code(law, symbol) for symbol in symbols] == symbols
    content = code.to_bytes()
    assert len(content) <= math.ceil((15 * n + (after is not None) * 1.0001 + 1) / 8)
    code = compress.Code(content)
    assert [code(law) for _ in symbols] == symbols and code.to_bytes() == content


@given(st.lists(st.floats(0, 1), min_size=2, max_size=300).filter(lambda p: sum(p) > 1e-9))
def test_frequencies_are_proportional(p):
    """Each is within its rounding of 2^16 p / Σp, but for the 1 that every symbol gets."""
    found = compress.frequencies(torch.tensor(p, dtype=torch.float64)).double()
    want = torch.tensor(p, dtype=torch.float64) / sum(p) * (2 ** 16 - len(p))
    assert found.sum() == 2 ** 16 and found.min() >= 1
    assert (found - want - 1).abs().sort().values[:-1].max() <= 1

# --- the chosen candidate


def test_the_chosen_candidate_is_a_sample_of_q():
    """z_K ~ N(δ, 1) by χ² over ten equally likely cells, with 2,000 keys, for 0.5 bits."""
    delta = torch.tensor([math.sqrt(2 * 0.5 * math.log(2))], dtype=torch.float64)
    z = torch.cat([compress.candidates(("χ²", i), 0, 1)[compress.choose(("χ²", i), delta, 8) - 1]
                   for i in range(2000)])
    cells = (torch.special.ndtr(z.double() - delta) * 10).long().clamp(0, 9).bincount(minlength=10)
    assert ((cells - 200.0) ** 2 / 200).sum() < 27.9  # exceeded with a probability of 0.001


@pytest.mark.parametrize("kl", [0.1, 1.0, 3.0])
def test_the_mean_length_keeps_the_bound(kl):
    """E[−log₂ p(K)] ≤ KL + log₂(KL + 1) + 4, and it is not below KL, for an exact sample of q. The
    code's ⌊log₂ K⌋ = j has a probability ∝ 2^{−j/μ} with μ = KL + (log₂ e)/e + 1."""
    b, n = 14, 200
    delta = torch.full((4,), math.sqrt(2 * kl * math.log(2) / 4), dtype=torch.float64)
    law, lengths = torch.tensor(compress.zipf(kl, b)) / 2 ** 16, []
    want = [2 ** (-j / (kl + math.log2(math.e) / math.e + 1)) for j in range(b)]
    assert law.tolist() == pytest.approx([p / sum(want) for p in want], abs=b / 2 ** 16)
    for i in range(n):
        k = compress.choose(("bound", i), delta, b)
        octave = k.bit_length() - 1
        lengths.append(octave - law[octave].log2().item())
    assert kl <= sum(lengths) / n <= kl + math.log2(kl + 1) + 4


def test_the_law_of_the_octaves_keeps_the_bound_and_is_the_same_everywhere():
    """With E⌊log₂ K⌋ ≤ μ, the most that it can be, −log₂ p(K) is at most KL + log₂(KL + 1) + 4 on average.
    For all KL and b of files no quotient that is rounded down lies within 10⁻⁶ of a whole number, so a
    machine whose powers differ by 10⁻¹⁰ has the same frequencies."""
    for i in range(6001):
        mu = (kl := i / 100) + math.log2(math.e) / math.e + 1
        assert mu + 1 - math.log2(1 - 2 ** (-1 / mu)) <= kl + math.log2(kl + 1) + 4
    for b in range(2, 17):
        for scale in range(64):
            kl = 2 ** (scale / 2) - 1
            kl /= max(1, round(kl / max(b - 2, 1)))
            p = 2 ** (-torch.arange(b).double() / (kl + 1.5307378))
            quotients = p / p.sum() * (2 ** 16 - b)
            assert (quotients - quotients.round()).abs().min() > 1e-6
            assert compress.zipf(kl, b)[1:] == (quotients.floor().long() + 1)[1:].tolist()


def test_candidates_are_standard_normal():
    """Mean 0, variance 1, no two blocks or keys alike, and multiples of 2⁻¹⁶."""
    blocks = [compress.candidates((1, 2), 0, 64), compress.candidates((1, 2), 1, 64),
              compress.candidates((1, 3), 0, 64)]
    for z in blocks:
        assert abs(z.mean()) < 0.02 and abs(z.var() - 1) < 0.02
        assert torch.equal(z * 2 ** 16, (z * 2 ** 16).round())
        assert sum(torch.equal(z, other) for other in blocks) == 1

# --- whole files


def network(channels: int = 1, seed: int = 0, **others) -> Trained:
    """A small network with random weights and T = 30."""
    settings = {"in_channels": channels, "image_size": 8, "channels": 32, "multipliers": [1],
                "blocks": 1, "attention": [8], "timesteps": 30, "schedule": "linear",
                "beta_start": 1e-4, "beta_end": 0.02, "predict": "eps", "variance": "fixed_large",
                "dropout": 0.0, "dataset": "images.pt", **others}
    torch.manual_seed(seed)
    net = build_network(settings).eval()
    torch.nn.init.normal_(net.conv_out.weight, std=0.05)
    return Trained(net, checkpoint.build_schedule(settings), settings, "a test")


def picture(channels: int = 1) -> torch.Tensor:
    return data.shapes(3, 8)[2][:channels]


@pytest.fixture(scope="module")
def file():
    return compress.encode(network(), picture(), 6)


def test_a_file_gives_the_picture_back():
    """Grey and colour, and whatever the network predicts."""
    for channels, predict in ((1, "eps"), (3, "x0"), (3, "mean")):
        trained = network(channels, predict=predict)
        content = compress.encode(trained, picture(channels), 6)
        found, step = compress.decode(trained, content)
        assert step == 0 and torch.equal(found, picture(channels))


def test_a_file_is_as_long_as_algorithm_3_says(file):
    """The sender's x_t are those of the posterior, so the length is near Eq. 5 for this chain."""
    trained, nats = network(), []
    times = sorted({round(30 ** (i / 19)) for i in range(20)})
    s = ddpm.respace(trained.s, times)
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(10):
            *_, (*_, rate) = ddpm.send(ddpm.Model(s, trained.net, variance="fixed_small"), data.to_model(picture())[None],
                                       lambda t: torch.randn(1, 1, 8, 8))
            nats.append(rate.item())
    bits = sum(nats) / len(nats) / math.log(2)
    assert 0.7 * bits < 8 * len(file) < 1.4 * bits + 8 * 13


class Spy:
    """Takes the place of the arithmetic code: what each symbol costs, in bits, and the symbols. A
    symbol of `forced`'s alphabet is always that one."""

    def __init__(self, alphabet: int = 0, forced: int = 0):
        self.bits, self.symbols, self.alphabet, self.forced = [], [], alphabet, forced

    def __call__(self, frequencies, symbol=0):
        symbol = self.forced if len(frequencies) == self.alphabet else symbol
        assert sum(frequencies) == 2 ** 16
        self.bits.append(16 - math.log2(frequencies[symbol]))
        self.symbols.append(symbol)
        return symbol


def test_x_T_is_sent_with_the_mean_of_eq_4():
    """Its KL, ᾱ_T Σ x_0² / (2 ln 2) bits, is the first symbol, in half octaves: for a chain in which
    it is no small number.

    Kills: ᾱ_T instead of its root, nats instead of bits."""
    trained = network()
    for beta in (0.01, 0.03):
        s = ddpm.schedule_from_betas(torch.full((30,), beta, dtype=torch.float64))
        code = Spy()
        next(compress.transmit(trained._replace(s=s), code, 6, picture()))
        x0 = picture().double() / 127.5 - 1
        kl = (1 - beta) ** 30 * x0.square().sum().item() / (2 * math.log(2))
        assert code.symbols[0] == round(2 * math.log2(1 + kl)) > 5


def test_each_class_of_pixels_has_its_best_variance():
    """The last message is shorter than with any one variance for all eight classes, and the classes
    of this picture differ."""
    trained, bits = network(), {}
    for forced in (None, *range(4, 14)):
        code = Spy(16 if forced is not None else 0, forced or 0)
        *_, last = compress.transmit(trained, code, 6, picture())
        assert torch.equal(data.to_uint8(last.x0_hat)[0], picture())
        bits[forced] = sum(code.bits)
    chosen = bits.pop(None)
    assert chosen < min(bits.values()) - 4


def test_every_beginning_shows_what_the_sender_had(file):
    """The first n bytes give x̂_0 of a state of the sender, a later one for a larger n; the first of
    them tell nothing yet."""
    states = {s.t: data.to_uint8(s.x0_hat)[0]
              for s in compress.transmit(network(), compress.Code(), 6, picture())}
    steps = []
    for n in range(13, len(file), 6):
        try:
            found, step = compress.decode(network(), file[:n])
        except EOFError as error:
            assert str(n) in str(error) and n < 13 + 6
            continue
        assert step > 0 and torch.equal(found, states[step])
        steps.append(step)
    assert steps == sorted(steps, reverse=True) and len(set(steps)) > 5
    assert len(steps) == len(range(13, len(file), 6)) - 1


def test_bytes_behind_a_file_are_damage(file):
    """One or sixteen million of them, at once; and a length that no code has."""
    trained, content = network(), file
    for more in (b"\0", content, bytes(2 ** 24)):
        started = time.process_time()
        with pytest.raises(ValueError, match="damaged"):
            compress.decode(trained, content + more)
        assert time.process_time() - started < 5
    long = compress.header(trained, content[5], 2 ** 24 - 1) + bytes(2 ** 24 - 1)
    with pytest.raises(ValueError, match="damaged"):
        compress.decode(trained, long)


class Lying(compress.Code):
    """Writes other checksums than it is given, as other pixels would have."""

    def __call__(self, frequencies, symbol=0):
        super().__call__(frequencies, symbol ^ (frequencies == [256] * 256))
        return symbol


def test_every_damaged_byte_is_noticed(file, long):
    """So is a file in which all is well but the checksum."""
    for i in range(0, len(file), 1 if long else 9):
        wrong = bytearray(file)
        wrong[i] ^= 1 << i % 8
        with pytest.raises(ValueError):
            compress.decode(network(), bytes(wrong))
    with pytest.raises(ValueError):
        compress.decode(network(), file + b"\0")
    trained, code = network(), Lying()
    *_, last = compress.transmit(trained, code, 6, picture())
    assert last.t == 0 and len(code.to_bytes()) == len(file) - 13
    with pytest.raises(ValueError, match="damaged"):
        compress.decode(trained, file[:13] + code.to_bytes())


def test_the_header_by_hand(file):
    """DDPM, version 4, b, the beginning of the network's hash, and the length of the rest; so a file
    of another kind, version or network is refused, if a single bit of its weights or settings
    differs, and so is a picture of another size."""
    trained = network()
    assert file[:4] == b"DDPM" and list(file[4:6]) == [4, 6]
    assert file[6:10] == checkpoint.weights_hash(trained)[:4]
    assert int.from_bytes(file[10:13], "big") == len(file) - 13
    for content in (b"", b"\x89PNG" + file[4:], file[:12], file[:4] + b"\1" + file[5:],
                    file[:5] + b"\0" + file[6:], file[:5] + b"\x11" + file[6:]):
        with pytest.raises(ValueError):
            compress.decode(trained, content)
    other = network()
    with torch.no_grad():
        other.net.conv_out.bias[0] = 1e-30
    for wrong in (other, network(seed=1), network(schedule="quadratic"), network(clip=False)):
        with pytest.raises(ValueError, match="network"):
            compress.decode(wrong, file)
    for wrong in (picture(3), torch.zeros(1, 8, 9, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="8, 8"):
            compress.encode(trained, wrong)


FILES = [  # of version 4, in base 85: channels, b, settings and bytes
    (1, 6, {"timesteps": 200},
     "L_|<c1P1=2@2vm;)CZTSJqMPSfDQ^+!<V^VAISKX)2+#FI8YbgW#MtFJNH9nr<|`_g*o*yFbZm7jA+&aa6|Eqq&8;|^KkM#=p"
     "W4DLjKNQXgwMj*7WQtt5c%+pMc2t@RFC$tS_V0p!)JI1ijIdXVd;uaZ~lB4eXC1x)&!HUqUS9s4H)!f)hgyzA-%zMcJ!{25k^"
     "|N-TjYN%{j$LQgtq=DDY0+_kq?vPML=n;C3RmM#2*Q{ANulcSlCClhM;4^Elcdkr;yfF#hzzyXpbShOVAz;RSU#s"),
    (3, 11, {"timesteps": 50, "predict": "x0"},
     "L_|<c1PigPZ)5-k*#@*HB2wfo!|No;Nd(M0`((n{M*?rM)xbKo(ZWqQ$7-{y7bjZ~80?NoC2*@ZfdpJBkmCqoR7qE{VixtX78"
     "(w)UnZS)R^?%lh@2nO9uv1TsId5BL)ow+OE}fy_Z*aFhHHprV-R_l_V=#*Re#|``=Pi;rZg$%DaaBxOduoP9}7(D_4@yFF$7$"
     "BWOVqb$otD-q?S_FX=Xp67xi4DjYfXQrtI#3tlz+R-Y>?9iLb%V&q5nNUUAan66O8Td>*AvVR?3x;C}CuGX1o-F_YpHT!aH-C"
     "g(Rh&jL5rO`}TM`dEzQG%eF5p=Xn<!YwmiTv*ktkiG&jL3|1|tv0CW_m98=iDG-~@+)zGILE6C-3}oG<C{MIyIWNRNc*aW1&H"
     "X=dzS1K)(@t0dnW_kFple}>=f3AHl?xri2vz$D=rS`0Os1yVY0U9hRr{vqYolrF9BGv%fDlMu~isOj+aYhZ_DLc*R%=<zKZVC"
     "&(epN1iwbIrD!Lqiw2QyHsRBrY9)}Da##M0?};oT7zN6eEDBIJYdFxQA(d2DJKW1lt<_{0DUcI=n3FHBnnY%!eNc9)@L3c9Kd"
     ")2k2y<M}bh>J{Ll{fRm6DN`SLjFDh7%PqGA*nC4wCh;nQCO%;~e>cS$g{NJ6q=m{q1KQ3e;LL8Hd|d*@h*H_@^G|22-`GJdQL"
     "-C^B8n)EPlDk2iNcITTBw%w1i0X+*0t(1z)o@qlO#a4RUaHPYt@Qw^XqX<UxKk@Qu=v*e!Lr!J@GG3qEQc~ei%WeA9wI?^2uA"
     "vX(h;kPuu3Xi99!_EHh-$t$C@Rr@Z#^7OV%aY1mSX#L^w!h!txwA<PE&8D`PP*w=yohSV0|SMVh2qd2=@FDK5+4W-u{w92`pm"
     "3e<epULKFv#4%R!(1Oujn|EgMg@)!x&!r{`(~qdq`UC~?Q!VL7<|y6RjbF-CFDokTu(8Q#{$SH*#ysG@a-7U+)1!k3Z!xeFRX"
     "3Re8&>V_9qVB!S}`KoU=8<@3d$%;GGJh$s7>oYc?X8#rXc4P6xs2@UrDIBw&Ls(;O`%W2xa|btsiU_eObX++G02VFolQc?crs"
     "*5J;$eM4vCQYsA6hyiA>*&XL2s_Xf3jyiNK!Pj?dZGU7A)8#ogV{noxCibXCxT4!+uV7lNw9p`DPEtkA+gkD7Uy-pz^k%e?ny"
     ">3^D19(s2AnMQ>!yRCk7MCa1YTFdI&U(!?<`$m~&<<4WH=9xNQU5-&fJMJ5+2&x1;=Qlib+$@E1^Ua~QwnN+^c>GI}LQx6YE1"
     "}kcUv0*1P5X$g0a5<ka`&3{`unCE#XI$S#J)g)ivGZOtaO#l>G)jokh5P+Q>5t}liHm2B?ta!O*MXtaN;SJ~3>ABvuVY|^)kf"
     "uqg*;uSwCFl9T_~(*O-*1Ol5IT$D2Z(Hkc(NzjDNL#T1WfGX*BqVkXdFFd%2`dj(LBYFhKTl%R^Dr%a<hOpJ|$(q?`*$tC5>}"
     "zbUwJgL_LDZFM;VFGx00ZHrz0LO7^4o#M6$tVa1O8;|=;Z3yZu2bs!KqnbJxqU4h$*l@q>GB2fV?2lcPjOUjKBFU}q?Ksvbhq"
     "_1-1kt)z%m@|OFf7!f{LK}BRrxsZMjI|A_IYd{pcJuQa)Y!C65wS6AksKF@ZQoz;SRsV3d#$uAmg^^)dj#ZtHaN1J(%sX*ZGK"
     "##!6b?6w7u1w(p2+gH}gbmg9^+K-Xjx)%_CBkhHynT1)XnccxctzTEhMQrn1b@2Z08I;JUM)X%nwKGb{aq40{W2v{31gvFnpQ"
     "kXw$Sv;8GIRDFjbYGL<nUal$k&t;pN6^)!LcRXG$F1OA0q)^@>LSXR_C_?xL%=BfUU46AjU`+J<A+ZkMM7#cLg>xx9*%litrD"
     "A(L3tA(;c6+V4*PUg=%p-y?)?zwR&u~QtwteadM9J`t8M"),
    (1, 3, {"timesteps": 1000},
     "L_|<c1OwCDR^<Qy@(h=`<|9u%$4%r{W{MWTaSZkh)1iic%oU>~V&JoI%?2SC?I~N<oqU+wFU5mH!;!Q+n?|Uu#&EA}i9h#)C>"
     "!qdECM6JrsI-x2F<|Fo}?YFemdGE-i-I<Uv*o54f6PqZzWBELAC%M6tDzZ>RNTL#S;y+r$Sfqbw3iEl^x6wKLU!TUZzjCy|UT"
     "%vH>YI8xE@DZ^quTN!*Lfr(z=pnf(e+=#olK6k!zcQIv7xez0u5Jk?sD-~uVIT-}4;m2Y&AoFB10Y?!nys#lHNEa36OIs(gY8"
     "EJdC0EvbC+0;A=&XLklEvK00xmW@")]


@pytest.mark.parametrize("channels, b, settings, content", FILES)
def test_files_of_this_version_stay_readable(channels, b, settings, content):
    """A file that lies here as bytes gives its picture, and the picture this file, with a network
    whose weights are given by a formula. Whatever changes what the bytes mean needs another version.

    Kills: other candidates, times, chunks, classes, orders or variances on both sides."""
    trained, content = network(channels, **settings), base64.b85decode(content)
    with torch.no_grad():
        for i, weight in enumerate(trained.net.state_dict().values()):
            n = torch.arange(weight.numel())
            weight.copy_((((n * 37 + i) % 101 - 50) / 512 + (weight.dim() == 1)).view_as(weight))
    picture, step = compress.decode(trained, content)
    assert step == 0 and picture.flatten().tolist() == [50 + 5 * i % 97 for i in range(64 * channels)]
    assert compress.encode(trained, picture, b) == content

# --- the command


@pytest.fixture
def run():
    """A picture.png and a run whose weights are random; its data set is a folder of two pictures for
    training and two for testing."""
    random_run(dataset="pictures")
    Path("picture.png").write_bytes(data.png(picture(3)))
    for part in ("train", "test"):
        Path("pictures", part).mkdir(parents=True)
        for i, image in enumerate(data.shapes(2, 8, part)):
            Path("pictures", part, f"{i}.png").write_bytes(data.png(image))


def test_both_sides_compute_the_same_bits(run, capsys):
    """A second process with other threads and without vector instructions reads the file; the
    averaged weights are those of both."""
    content = compress.encode(checkpoint.load("runs/images"), picture(3), 6)
    Path("a.ddpm").write_bytes(content)
    settings = {"OMP_NUM_THREADS": "2", "ATEN_CPU_CAPABILITY": "default"}
    subprocess.run([sys.executable, "-m", "extras.compress", "decode", "a.ddpm", "b.png"], check=True,
                   env={**os.environ, **settings, "PYTHONPATH": str(HERE)})
    assert Path("b.png").read_bytes() == Path("picture.png").read_bytes()
    assert compress.main("decode --bytes 40 a.ddpm c.png --checkpoint runs/images".split()) == 0
    assert (read_png("c.png") != picture(3)).any()
    numbers = [int(word) for word in capsys.readouterr().err.split() if word.isdigit()]
    assert {40, len(content)} <= set(numbers)


def test_a_png_becomes_a_file(run):
    """What is written of a PNG, grey or RGB, is what `encode` makes of its pixels; b is 12 unless it
    is given. Anything else is refused in one line, and no file is left."""
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    trained = checkpoint.load("runs/images")
    for flags, b in (([], 12), (["--b", "5"], 5)):
        assert compress.main(["encode", *flags, "picture.png", "a.ddpm"]) == 0
        assert Path("a.ddpm").read_bytes() == compress.encode(trained, picture(3), b)
    raw = Path("picture.png").read_bytes()
    opened = image.open("picture.png")
    opened.convert("RGBA").save("rgba.png")
    opened.convert("L").save("grey.png")
    opened.save("x.jpg")
    Path("cut.png").write_bytes(raw[:len(raw) // 2])
    for name in ("rgba.png", "grey.png", "x.jpg", "cut.png", "images.pt", "no.png", "."):
        assert compress.main(["encode", name, "b.ddpm"]) == 1
        assert not Path("b.ddpm").exists()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


@pytest.mark.parametrize("colour, depth, before, what", [
    (0, 8, b"", None), (2, 8, b"", None), (0, 4, b"", None), (0, 16, b"", "16"), (2, 16, b"", "16 bits"),
    (0, 8, chunk(b"tRNS", bytes(2)), "transparency"), (2, 8, chunk(b"tRNS", bytes(6)), "transparency"),
    (4, 8, b"", "transparency"), (6, 8, b"", "transparency"), (6, 16, b"", "16 bits, transparency"),
    (2, 8, chunk(b"acTL", struct.pack(">II", 2, 0)), "frames"), (3, 8, chunk(b"PLTE", bytes(768)), "mode P"),
    (2, 8, chunk(b"iCCP", b"P3\0\0" + zlib.compress(b"a profile")), "a colour profile"),
    (2, 8, chunk(b"eXIf", b"II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"), "a rotation")])
def test_what_a_file_would_lose_is_refused(capsys, colour, depth, before, what):
    """PNGs of 8×8 pixels written by hand: 16 bits, transparency of a channel or of a single colour, more
    than one frame, a palette, a colour profile and a rotation are refused by name; the others come back with the same pixels, those of
    4 bits as 8 bits of the same levels."""
    pytest.importorskip("PIL", reason="Pillow is not installed")
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    random_run(in_channels=3 if channels > 2 else 1)
    line = bytes(range(0, 8 * channels * depth // 8))
    Path("a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, depth, colour, 0, 0, 0)) + before
        + chunk(b"IDAT", zlib.compress((b"\0" + line) * 8)) + chunk(b"IEND", b""))
    status = compress.main("encode --b 4 a.png a.ddpm".split())
    err = capsys.readouterr().err
    assert status == (what is not None) == (not Path("a.ddpm").exists())
    if what:
        assert what in err and err.count("\n") == 1
        return
    assert compress.main("decode a.ddpm b.png".split()) == 0 and "the pixels, exactly" in capsys.readouterr().err
    levels = [x for byte in line for x in ([byte] if depth == 8 else [byte // 16 * 17, byte % 16 * 17])]
    assert read_png("b.png").permute(1, 2, 0).flatten().tolist() == 8 * levels


def test_no_name_of_the_source_is_overwritten(run, capsys):
    """Under another path, a symbolic or a hard link it is the same file; so it stays as it is."""
    content = Path("picture.png").read_bytes()
    os.symlink("picture.png", "soft.png")
    os.link("picture.png", "hard.png")
    for name in (f"../{Path.cwd().name}/picture.png", "./picture.png", "soft.png", "hard.png", Path.cwd() / "picture.png"):
        for action in ("encode", "decode"):
            assert compress.main([action, "picture.png", str(name)]) == 2
            assert "overwrite" in (err := capsys.readouterr().err) and err.count("\n") == 1
    assert Path("picture.png").read_bytes() == content and Path("soft.png").is_symlink()


ACTIONS = {"encode": "picture.png x", "decode": "file.ddpm x.png", "measure": ""}
MEANT = {"--b 7": {"encode", "measure"}, "--n 2": {"measure"}, "--bytes 100": {"decode"}}
SAYS = {**MEANT, "--data-dir there": set(), "--checkpoint runs/other": {*ACTIONS}}
BASE = {"encode": ["--b", "6"], "decode": [], "measure": ["--b", "2", "--n", "1"]}


@pytest.mark.parametrize("action", ACTIONS)
def test_every_choice_reaches_every_file(run, capsys, action):
    """Each flag changes what it must and is refused where it has no meaning; another network cannot
    read a file. The folder of the data, where decoded pictures are kept, changes nothing else. The
    flags are read off the command, so that a new one without a line above fails."""
    pytest.importorskip("PIL", reason="Pillow is not installed")
    state = checkpoint.load_checkpoint(Path("runs/images/checkpoint.pt"))
    state["ema"]["conv_out.bias"] += 0.1
    state.pop("format")
    checkpoint.save_checkpoint(Path("runs/other/checkpoint.pt"), state)
    files = ["encode", "picture.png", "file.ddpm", "--checkpoint", "runs/images", "--b", "6"]
    assert compress.main(files) == 0 and capsys.readouterr()

    def made(*flags) -> tuple[str, bytes]:
        base = ["--checkpoint", "runs/images", *BASE[action]]
        assert compress.main([action, *ACTIONS[action].split(), *base, *flags]) == 0
        out = Path("compress.png" if action == "measure" else ACTIONS[action].split()[1])
        return capsys.readouterr().out, out.read_bytes()
    assert flags_of(compress.main) == {words.split()[0] for words in SAYS} | {"--help"}
    base = made()
    for words in SAYS:
        if action not in MEANT.get(words, ACTIONS):
            assert compress.main([action, *ACTIONS[action].split(), *words.split()]) == 2, words
        elif (action, words) == ("decode", "--checkpoint runs/other"):
            assert compress.main([action, *ACTIONS[action].split(), *words.split()]) == 1
        else:
            assert (made(*words.split()) == base) == (action not in SAYS[words]), words
    assert all(any(Path(folder).glob("test-8-*.u8")) == (action == "measure") for folder in ("data", "there"))


def test_measure_prints_every_format(run, capsys):
    """Of the test images: the whole files are exact, as PNG is; their beginnings err less and less. A
    row of the picture is what 16, 32, 64, 128, 256 and all bytes of a file show."""
    pytest.importorskip("PIL", reason="Pillow is not installed")
    assert compress.main("measure --b 6".split()) == 0
    rows = capsys.readouterr().out.splitlines()
    errors = {row[:22].strip(): float(row.split()[-1]) for row in rows}
    sizes = {row[:22].strip(): float(row[22:].split()[0]) for row in rows}
    bits = {row[:22].strip(): float(row[22:].split()[2]) for row in rows}
    trained, images = checkpoint.load(), data.shapes(2, 8, "test")
    content = [compress.encode(trained, image, 6) for image in images]
    assert sizes["whole files"] == sum(map(len, content)) / 2
    assert bits["whole files"] == pytest.approx(8 * sizes["whole files"] / 192, abs=1e-3)
    assert errors["whole files"] == errors["PNG"] == errors["WebP, lossless"] == 0
    assert len(rows) == 6 + 7 and 0 < errors["JPEG, quality 75"] < errors["JPEG, quality 5"]
    shown = cells("compress.png", 6, 10).view(2, 6, 3, 8, 8)
    assert torch.equal(shown[:, 5], images.int())
    for i, cut in enumerate((16, 32, 64, 128, 256)):
        name = f"their first {cut} bytes"
        assert sizes[name] == cut and bits[name] == pytest.approx(8 * cut / 192, abs=1e-3)
        for image, row in zip(content, shown):
            try:
                want = compress.decode(trained, image[:cut])[0].int()
            except EOFError:
                want = torch.tensor(128)
            assert (row[i] == want).all()
        rmse = (shown[:, i] - images).double().square().mean().sqrt().item()
        assert errors[name] == pytest.approx(rmse, abs=6e-3)
    assert errors["their first 256 bytes"] < errors["their first 64 bytes"] < errors["their first 32 bytes"]


class Simple(torch.nn.Module):
    """A network without weights. If it drifts, no two calls give the same."""
    calls = itertools.count()

    def __init__(self, drifts: bool = False):
        super().__init__()
        self.drifts = drifts

    def forward(self, x, t):
        return 0.3 * x + (next(Simple.calls) / 100 if self.drifts else 0)


def test_what_cannot_be_shown_is_grey_but_a_file_that_is_wrong_is_an_error(capsys):
    """Of nine images the first eight are shown; grey ones are measured, too. Here 16 bytes show nothing,
    since x_T alone takes more. A file that does not give the picture back, because the network computes
    something else each time, is not passed over as one that is too short."""
    pytest.importorskip("PIL", reason="Pillow is not installed")
    images, s = data.shapes(9, 8)[:, :1], ddpm.schedule_from_betas([0.01, 0.01])
    shown = compress.measure(network()._replace(net=Simple(), s=s), images, 6)
    assert shown.shape == (1, 8 * 80, 6 * 80) and (shown[:, :, :80] == 128).all()
    assert torch.equal(shown[:, ::10, 400::10], images[:8].transpose(0, 1).reshape(1, 64, 8))
    rmse = (images - 128.0).square().mean().sqrt().item()
    assert float(capsys.readouterr().out.splitlines()[0].split()[-1]) == pytest.approx(rmse, abs=6e-3)
    with pytest.raises(ValueError, match="damaged"):
        compress.measure(network()._replace(net=Simple(drifts=True), s=s), images[:1], 6)


@pytest.mark.parametrize("line, status, said", [
    ("encode picture.png", 2, "encode"), ("decode a.ddpm a.ddpm", 2, "decode"), ("measure a b", 2, "measure"),
    ("encode --bytes 9 picture.png a", 2, "--bytes"), ("decode --b 9 a b", 2, "--b "),
    ("decode --n 9 a b", 2, "--n"), ("encode --n 9 a b", 2, "--n"), ("measure --bytes 9", 2, "--bytes"),
    ("encode --b 17 a b", 2, "17"), ("encode --b 0 a b", 2, "0"), ("encode picture.png runs", 1, "runs"),
    ("decode no.ddpm b.png", 1, "no.ddpm"), ("decode picture.png b.png", 1, "picture.png"),
    ("squeeze a b", 2, "squeeze"), ("encode picture.png other.png", 2, ".png"), ("decode a.ddpm b.jpg", 2, ".png"), ("encode --checkpoint none.pt a b", 1, "none.pt")])
def test_a_mistake_is_one_line(run, capsys, line, status, said):
    before = sorted(os.listdir())
    assert compress.main(line.split()) == status
    captured = capsys.readouterr().err
    assert said in captured and captured.count("\n") == 1 and sorted(os.listdir()) == before


def test_an_error_of_the_network_is_not_blamed_on_the_file(run, capsys):
    """It is told with its place, not as a file that cannot be read."""
    pytest.importorskip("PIL", reason="Pillow is not installed")
    Path("a.ddpm").write_bytes(compress.encode(checkpoint.load("runs/images"), picture(3), 1))
    for line in ("encode picture.png b.ddpm", "decode a.ddpm b.png"):
        with hooked(UNet, lambda *_: 1 / 0):
            assert compress.main(line.split()) == 1
        assert "unexpected ZeroDivisionError in test_compress.py" in (err := capsys.readouterr().err) and "cannot" not in err


def test_no_more_images_are_measured_than_there_are(run, capsys):
    """A mean of fewer would be told as that of as many as were asked for."""
    pytest.importorskip("PIL", reason="Pillow is not installed")
    assert compress.main("measure --n 999".split()) == 2 and not Path("compress.png").exists()
    assert "--n 999: there are 2 test images" in capsys.readouterr().err.splitlines()[-1]


def test_a_file_that_is_cut_off_is_no_picture(run, capsys):
    """An estimate in place of the picture is only shown if --bytes asks for it."""
    content = compress.encode(checkpoint.load("runs/images"), picture(3), 1)
    Path("a.ddpm").write_bytes(content[:-1])
    assert compress.main("decode a.ddpm b.png".split()) == 1 and not Path("b.png").exists()
    line, n = capsys.readouterr().err, len(content)
    assert f"a.ddpm is cut off, {n - 1} of {n} bytes: --bytes {n - 1}" in line and line.count("\n") == 1
    assert compress.main(f"decode --bytes {n - 1} a.ddpm b.png".split()) == 0 and Path("b.png").exists()


def test_too_few_bytes_are_one_line(run, capsys):
    """Of a good file; no picture is left."""
    Path("a.ddpm").write_bytes(compress.encode(checkpoint.load("runs/images"), picture(3), 1))
    assert compress.main("decode --bytes 13 a.ddpm b.png".split()) == 1
    assert "13" in (err := capsys.readouterr().err) and err.count("\n") == 1
    assert not Path("b.png").exists()


@pytest.mark.parametrize("change, line, status", [
    ({"variance": "learned", "objective": "vlb"}, "decode a.ddpm b.png", 1), ({"dataset": None}, "measure", 2)])
def test_networks_that_cannot_be_used(run, capsys, change, line, status):
    """One with learned variance, and one of which nobody knows the data set."""
    random_run(**change)
    state = checkpoint.load_checkpoint(Path("runs/images/checkpoint.pt"))
    state["settings"] = {key: value for key, value in state["settings"].items() if value is not None or key != "dataset"}
    del state["format"]
    checkpoint.save_checkpoint(Path("runs/images/checkpoint.pt"), state)
    Path("a.ddpm").write_bytes(b"a file")
    assert compress.main(line.split()) == status
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and ("learned variance" if status == 1 else "data set") in err
