"""The formulas as C++ source, made from their expressions (`expressions.py`); functions of vectors in `native/`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from neuroweave.activations.expressions import Expression, add, derivative, lift, multiply, statements, trace, variable
from neuroweave.activations.neuron_functions import Member

Kernel = tuple[tuple[Member, ...], bool]  # members, whether they are weighted by neuron


def members_expressions(kernel: Kernel) -> list[Expression]:
    """Each member of x; a beta of each neuron is the variable `beta`."""
    x = variable("x")
    found = []
    for name, beta in kernel[0]:
        found.append(trace(name, x, variable("beta") if isinstance(beta, str) else beta))
    return found


def whole(kernel: Kernel, parts: Sequence[Expression]) -> Expression:
    """The weighted sum of the members; weights are the variables `w0`, `w1`, ..."""
    if not kernel[1]:
        return parts[0]
    total = lift(0.0)
    for k, part in enumerate(parts):
        total = add(total, multiply(variable(f"w{k}"), part))
    return total


def has_beta(kernel: Kernel) -> bool:
    return any(isinstance(beta, str) for _, beta in kernel[0])


def cpp_statements(results: Sequence[tuple[str, Expression]]) -> str:
    number: Callable[[float], str] = lambda value: f"all({value!r}f)"  # noqa: E731
    return " ".join(statements(results, number=number, function=lambda f: f"f_{f}", declare="vec ", end=";"))


def activate_source(kernels: Sequence[Kernel]) -> str:
    """`activate(kind, x, y, n, weights, stride, beta)`: y = the kernel number `kind` of x; weights [K, stride]."""
    cases = [activate_case(number, kernel) for number, kernel in enumerate(kernels)]
    return (
        "void activate(int kind, const float *px, float *py, int n, const float *pw, int stride, const float *pb) {\n"
        "    switch (kind) {\n" + "".join(cases) + "    }\n}\n"
    )


def activate_case(number: int, kernel: Kernel) -> str:
    code = cpp_statements([("y", whole(kernel, members_expressions(kernel)))])
    loads = weight_loads(kernel)

    def body(load: Callable[[str], str], store: str) -> str:
        return f"{{ vec x = {load('px + i')}; {loads(load)} {code} {store} }}"

    full = body(lambda p: f"load({p})", "store(py + i, y);")
    rest = body(lambda p: f"load_part({p}, n - i)", "store_part(py + i, y, n - i);")
    loop = f"int i = 0; for (; i + WIDTH <= n; i += WIDTH) {full}"
    return f"    case {number}: {{ {loop}\n      if (i < n) {rest} break; }}\n"


def weight_loads(kernel: Kernel) -> Callable[[Callable[[str], str]], str]:
    """The lines that load a kernel's weights and beta, given how a vector is loaded."""

    def lines(load: Callable[[str], str]) -> str:
        found = [f"vec w{k} = {load(f'pw + (size_t){k} * stride + i')};" for k in range(len(kernel[0]) * kernel[1])]
        return " ".join(found + ([f"vec beta = {load('pb + i')};"] if has_beta(kernel) else []))

    return lines


def gradient_results(kernel: Kernel) -> list[tuple[str, Expression]]:
    """y, its derivative dx, the members m0, m1, ... where they are weighted, and dbeta: what a backward pass needs."""
    parts = members_expressions(kernel)
    total = whole(kernel, parts)
    results = [("y", total), ("dx", derivative(total, "x"))]
    if kernel[1]:
        results += [(f"m{k}", part) for k, part in enumerate(parts)]
    return results + ([("dbeta", derivative(total, "beta"))] if has_beta(kernel) else [])
