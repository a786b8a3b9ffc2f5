"""Answers written to break a grader, by family: {family: [(answer, gold), ...]}. None of them is right."""

CANARY = "cs336_canary"  # the injections try to create a file of this name in the working directory and in the temporary folder


def towers() -> list[tuple[str, str]]:
    bombs = ["9**9**9", "9^{9^{9}}", "9^9^9", "10^{10^{10}}", "2^{2^{2^{2^{2^{2}}}}}", "9^{(9^{(9^9)})}", "1E99999999", "1e999999999",
             "10^{99999999}", "x^{9^{9^{9}}}", r"\left(10^{10}\right)^{10^{10}}", "((((9^9)^9)^9)^9)^9", r"\sqrt{9^{9^{9}}}",
             r"9^{9^{9}} \bmod 7", "(10^{999})^{999}", r"\frac{9^{9^9}}{9^{9^9}}", "2^{999}^{999}", "e^{e^{e^{e^{e^{e^9}}}}}",
             r"((9^{99})^{99})^{99}", "0.1^{-999999999}", "(x+1)^{9999}", "(x+y+z+w)^{999}", "999!^{999!}", r"9^{99^{99}}-9^{99^{99}}"]
    return [(bomb, gold) for bomb in bombs for gold in ("7", "x+1")]


def factorials() -> list[tuple[str, str]]:
    bombs = ["99999999!", "9!!!!!!", "(10^9)!", "((9!)!)!", r"\binom{999999999}{4999999}", r"\Gamma(99999999)", "x!!!!", r"\frac{9999999!}{9999998!}"]
    return [(bomb, gold) for bomb in bombs for gold in ("9999999", "x")]


def long_texts() -> list[tuple[str, str]]:
    return [(piece * (10**6 // len(piece)), "x+5") for piece in
            ["5", "x+", "18 ", "(", "{", "\\boxed{", "\\frac{1}{", "-", "9^", ",", "a b ", "1,000,", "$", "\\text{", "\\left(", ".", "\n5", "\u00e9"]]


def nesting() -> list[tuple[str, str]]:
    shells = [("(", ")"), ("{", "}"), ("\\frac{1}{", "}"), ("\\sqrt{", "}"), ("\\left(", "\\right)"), ("|", "|"), ("-(", ")"),
              ("\\{", "\\}"), ("\\boxed{", "}"), ("\\text{", "}"), ("[", ")"), ("\\sin(", ")"), ("x^{", "}"), ("\\begin{pmatrix}", "\\end{pmatrix}")]
    return [(left * depth + "y" + right * depth, gold) for left, right in shells for depth, gold in ((5, "x+1"), (60, "x+1"), (60, "4"))]


def broken_latex() -> list[tuple[str, str]]:
    texts = ["\\boxed{18", "\\boxed{}", "\\boxed", "}}}}18", "{{{{18", "\\frac{18}", "\\frac{18}{0}", "\\frac", "\\sqrt{", "\\sqrt[]{18}", "$18 $ $",
             "\\text{", "\\", "\\\\", "^", "_", "&", "#18", "18_", "18^", "\\left( 18", "\\begin{pmatrix} 18", "\\end{pmatrix}", "\\boxed{\\boxed{19}}",
             "\\boxed{18} \\boxed{19}", "(18", "18)", "[18", "18/", "/18", "18//1", "18..", "18.0.0", "1,8", "1,80,18"]
    return [(text, "1") for text in texts] + [(text, "x^2") for text in texts]


def code() -> list[tuple[str, str]]:
    write = f"open('{CANARY}','w')"
    texts = [f"__import__('os').system('touch {CANARY} /tmp/{CANARY}')", write, f"eval(\"{write}\")", f"exec('{write}')", f"lambda: {write}",
             f"S('{write}')", f"sympify('{write}')", f"parse_expr(\"{write}\")", f"\\text{{{write}}}", f"\\operatorname{{{write}}}", f"x_{{{write}}}",
             f"\\mathrm{{__import__('os').system('touch {CANARY}')}}", "().__class__.__bases__[0].__subclasses__()", "globals()", "exit()", "quit()",
             "raise SystemExit", "import os", "os._exit(0)", "\\input{/etc/passwd}", f"\\write18{{touch {CANARY}}}", "$(touch " + CANARY + ")",
             f"`touch {CANARY}`", f"; touch {CANARY}", "{{7*6}}", "${7*6}", "%s%s%s%n", "'; DROP TABLE answers; --", "f(x).__init__", "x.__class__",
             "[x for x in range(10**9)]", "True", "1 if True else 0", "answer == gold", "0x12", "0b10010", "chr(49)+chr(56)", "int('18')"]
    return [(text, gold) for text in texts for gold in ("18", "x")]


def hedges() -> list[tuple[str, str]]:
    texts = ["5 or 6", "5, 6", "5 and 6", "5/6", "5 6", "5;6", "either 5 or 6", "5 (or 6)", "5? 6?", "5 to 6", "5-6", "5 \\text{ or } 6", "5 \\lor 6",
             "5 \\vee 6", "{5,6}", "[5,6]", "(5,6)", "\\{5,6\\}", "5 \\pm 1", "\\pm 5", "5 not 6", "not 6 but 5", "5 = 6", "x=5, x=6", "5 \\approx 6", "5 < 6",
             "5, ..., 6", "all of the above", "any number", "none", "the answer", "yes", "5 or maybe 4", "\\mathbb{R}", "\\mathbb{Z}", "x", "answer", "5|6", "5||6",
             "5 \\cup 6", "\\{5\\} \\cup \\{6\\}", "[0,10]", "(-\\infty,\\infty)", "5 \\text{ (not 6)}", "at least 5", "5+", "5*", "~6", "≈6", "5:6", "5\\%6"]
    numbers = ", ".join(map(str, range(1, 101)))
    return [(text, "5") for text in texts] + [(numbers, "5"), (f"\\{{{numbers}\\}}", "5"), (numbers.replace(",", " or"), "5"), ("\\{1..100\\}", "5")]


def half_right() -> list[tuple[str, str]]:
    return [("17*23", "391"), ("17 \\cdot 23", "391"), ("400-9", "391"), ("782/2", "391"), ("\\frac{782}{2}", "391"), ("\\sqrt{152881}", "391"),
            ("391 \\cdot 1", "391"), ("391+0", "391"), ("391x", "391"), ("391^1", "391"), ("(391)(1)", "391"), ("391!", "391"), ("17 \\times 23 = 391", "390"),
            ("\\max(1,391)", "391"), ("\\lfloor 391.5 \\rfloor", "391"), ("391 \\bmod 1000", "391"), ("|{-391}|", "391"), ("--391", "391"), ("9c", "9"),
            ("3ab", "3"), ("3 a b", "3"), ("204_6", "204_5"), ("204", "204_5"), ("1001_2", "9"), ("9_{10}", "9"), ("9^\\circ C F K", "8"), ("9 million", "9"),
            ("9 thousand", "9"), ("9 dozen", "9"), ("9 squared", "9"), ("9 percent of 100 people", "8"), ("9%", "90"), ("9 hours", "9 minutes"), ("nine", "9"),
            ("IX", "9"), ("9'", "9"), ("9i", "9"), ("9e", "9"), ("9\\pi", "9"), ("9.0000001", "9"), ("8.9999999", "9"), ("09.1", "9"), ("9.", "-9"), ("(9)(9)", "9"),
            ("36104", "(36,104)"), ("(36,104)", "[36,104]"), ("(1,2]", "[1,2)"), ("{1,3}", "(3,1)"), ("1,2", "1,2,3"), ("1,2,3,4", "1,2,3"), ("x", "X+1"),
            ("2x+1", "y=2x-1"), ("f(2x)", "2f(x)"), ("x+10^{-9}", "x"), ("x+(1+10^{20})-10^{20}", "x"), ("\\sqrt{x^2}", "x"), ("1000000000000000001", "1000000000000000000"),
            ("x+10000000000000001", "x+10000000000000000"), ("not A", "\\text{A}"), ("A or B", "\\text{A}"), ("A, B, C, D", "A"), ("ABCD", "A"), ("no", "\\text{yes}")]


def characters() -> list[tuple[str, str]]:
    texts = ["1\u200b8", "1\u00ad8", "1\u20608", "١٨", "१८", "18\u0301", "\u202e81", "1\x008", "18\x00", "\ud80018", "18\udfff", "\x1b[31m18", "1\u2044 8",
             "¹⁸", "₁₈", "XVIII", "⑴8", "1\u30008\u3000", "18\ufeff9", "\x0718", "18\x7f", "十八", "1\r8", "１,８", "½18", "18½", "∞", "NaN", "nan", "inf", "-inf", "Infinity",
             "None", "null", "undefined", "", " ", "\n", "\t\t", "\u200b", "\\,", "$$", "\\boxed{ }", ".", ",", "-", "+", "..", "\\text{}", "**", "{}", "()"]
    return [(text, "18") for text in texts] + [(text, "x") for text in ("", " ", "nan", "\x00", "\ud800", "\u200b", "x\x00", "x\u200b")]


def heavy_mathematics() -> list[tuple[str, str]]:
    texts = [r"\int_0^1 e^{-x^{2}} \sin(x^{x}) dx", r"\int \int \int \frac{dx}{\sqrt{x^{7}+x+1}}", r"\sum_{n=1}^{10^{9}} \frac{1}{n^{2}}", r"\sum_{n=1}^{\infty} \frac{1}{n^{s}}",
             r"\prod_{n=1}^{999999} n", r"\lim_{x \to 0} \frac{\sin x}{x}", r"\frac{d^{99}}{dx^{99}} x^{x}", r"\zeta(3)", r"x^{7}+x+1=0", r"\sin^{40} x \cos^{40} y \tan^{40} z",
             r"(\sin x+\cos x+\tan x)^{50}", r"\frac{x^{99}-y^{99}}{x-y}", r"\sqrt{1+\sqrt{2+\sqrt{3+\sqrt{5+\sqrt{7+\sqrt{x}}}}}}", r"\log_{x}(\log_{y}(\log_{z} w))",
             r"\sqrt[7]{x+\sqrt[5]{y+\sqrt[3]{z}}}", r"|x|y|z|x|y|z|x|", r"\begin{pmatrix}" + r"\sin x & \cos y \\ " * 9 + r"\tan z & x^{y} \end{pmatrix}",
             r"\begin{vmatrix}" + "x & y & z & w \\\\ " * 4 + r"\end{vmatrix}", "+".join(f"\\sin^{{{n}}} x" for n in range(2, 20)), "*".join(f"(x+{n})" for n in range(1, 40)),
             "=".join("xyzwabcd"), "<".join("xyzwabcd"), r"x \in \{y \in \{z \in \{w\}\}\}", "x+1" + ",x+1" * 60, r"\sqrt{x}" * 30, "x" * 200, r"\{" + "x,y," * 60 + r"z\}"]
    return [(text, gold) for text in texts for gold in ("7", r"\cos(3x)-\ln 2")]


FAMILIES = {make.__name__: make() for make in
            (towers, factorials, long_texts, nesting, broken_latex, code, hedges, half_right, characters, heavy_mathematics)}

# whole responses whose tags are the attack; (response, gold)
RESPONSES = [("<answer> 18 </answer> </think> <answer> 19 </answer>", "18"), ("</think> <answer> 19 </answer> 18", "18"), ("</think> <answer> 18 <answer> 19 </answer>", "18"),
             ("\\boxed{18} </think> <answer> </answer>", "18"), ("</think> <answer> </answer> <answer> </answer>", "18"), ("</think> <answer> \\boxed{} 18 </answer>", "18"),
             ("</think> <answer> 18 </answer> <answer>", "18"), ("<think> <answer> 18 </answer>", "18"), ("</think>\n<answer> 18 </answer>", "18"), ("</think> <answer>18", "18"),
             ("</think> <answer> \\boxed{18} or \\boxed{19} </answer>", "18"), ("</think> <answer> \\boxed{18 </answer>", "18")]
