"""Check `conv_mlp` on this GPU, then time it against the three kernels it stands for. About a minute, most of it compiling."""

import os
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from shiftaddvit.ops.conv_gelu import conv_gelu
from shiftaddvit.ops.conv_mlp import conv_mlp
from shiftaddvit.ops.conv_mlp import triton as launches
from shiftaddvit.ops.norm_linear import norm_linear, route_rows
from shiftaddvit.ops.tiling import Tile
from shiftaddvit.ops.timing import copies_for, time_call

WORKERS = max(1, min(16, (os.cpu_count() or 2) - 1))
CHECKS = [(b, h, w, e, f, k, s) for (b, h, w) in ((1, 7, 7), (3, 14, 14), (2, 28, 28), (3, 56, 56), (1, 13, 9)) for (e, f, k, s) in
          ((1, 1, 64, 2), (2, 2, 4, 2), (2, 2, 64, 1))]
CHECKS += [(3, 56, 56, 2, 1, 16, 2), (3, 56, 56, 1, 2, 16, 2), (2, 5, 64, 2, 2, 2, 2), (32, 56, 56, 2, 2, 16, 2)]
CHECKS = [(*c, 32) for c in CHECKS]
CHECKS += [(3, 7, 7, 2, 2, 64, 1, 64), (3, 14, 14, 1, 1, 4, 1, 64), (3, 28, 28, 1, 1, 16, 1, 64), (32, 28, 28, 2, 2, 16, 1, 64), (2, 13, 9, 2, 2, 2, 1, 64),
           (3, 56, 56, 2, 2, 64, 1, 64)]
TIMES = [(b, 56, 56, e, e, k, s, 32) for e in (1, 2) for b, ks, ss in ((1, (2, 4), (2,)), (8, (2, 4), (2,)), (32, (16, 32), (2, 1)), (256, (32, 64), (2, 1)))
         for k in ks for s in ss]
TIMES += [(b, 28, 28, e, e, k, 1, 64) for e in (1, 2) for b, ks in ((1, (2,)), (8, (2, 4)), (32, (4, 8)), (256, (16, 32))) for k in ks]


def problem(batch, height, width, first, second, C=32, dtype=torch.bfloat16, seed=0):
    HIDDEN = 8 * C
    g = torch.Generator(device="cuda").manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, device="cuda", generator=g)
    x = normal(batch, height * width, C).to(dtype)
    rows = lambda n: route_rows(normal(2, n), torch.float16)
    fc1 = (normal(first, HIDDEN, C) * C**-0.5).half(), normal(first, HIDDEN), rows(C) if first == 2 else None
    fc2 = (normal(second, C, HIDDEN) * HIDDEN**-0.5).half(), normal(second, C), rows(HIDDEN) if second == 2 else None
    conv = (normal(9, HIDDEN) * 0.3).half(), normal(HIDDEN)
    return x, height, width, (normal(C) + 1, normal(C)), 1e-6, fc1, conv, fc2


def three(x, height, width, norm, eps, fc1, conv, fc2):
    h, _ = norm_linear(x, fc1[0], fc1[1], norm, eps, fc1[2])
    a = conv_gelu(h, height, width, *conv)
    return norm_linear(a, fc2[0], fc2[1], router=fc2[2], residual=x)[0]


def exact(x, height, width, norm, eps, fc1, conv, fc2):
    def linear(a, part):
        y = torch.einsum("...k,enk->...en", a, part[0].double()) + part[1].double()
        return y[..., 0, :] if part[2] is None else torch.where((a @ part[2].double().sum(0) > 0).unsqueeze(-1), y[..., 1, :], y[..., 0, :])

    a = F.layer_norm(x.double(), x.shape[-1:], norm[0].double(), norm[1].double(), eps)
    h = linear(a.half().double(), fc1).half().double()
    h = h.transpose(1, 2).unflatten(2, (height, width))
    y = F.gelu(F.conv2d(h, conv[0].double().t().reshape(-1, 1, 3, 3), conv[1].double(), padding=1, groups=h.shape[1])).flatten(2).transpose(1, 2)
    return x.double() + linear(y.half().double(), fc2)


def tiled(k, stages):
    launches.mlp_tile = lambda *_: Tile(64, 256, k, 8, stages)


def run_job(job):
    kind, (b, h, w, e, f, k, s, c) = job
    arguments = problem(b, h, w, e, f, c)
    if kind == "three":
        three(*arguments)
    else:
        tiled(k, s)
        conv_mlp(*arguments, backend="triton")
    torch.cuda.synchronize()


def jobs():
    seen, out = set(), []
    for c in TIMES + CHECKS:
        b, h, w, e, f, k, s, _ = c
        key = (c[7], h, w, e, f, launches.strips_of(h, k)[1], s)
        if key not in seen:
            seen.add(key)
            out.append(("one", c))
    out += [("three", (b, side, side, e, e, 0, 0, c)) for side, c in ((56, 32), (28, 64)) for b in (1, 8, 32, 64, 256) for e in (1, 2)]
    return out


def main():
    start = time.time()
    todo = jobs()
    workers = [subprocess.Popen([sys.executable, __file__, "--compile", str(i)]) for i in range(WORKERS)]
    for worker in workers:
        worker.wait()
    print(f"{len(todo)} kernels compiled in {time.time() - start:.0f} s by {WORKERS} processes; torch {torch.__version__}, {torch.cuda.get_device_name()}", flush=True)

    bad = 0
    for b, h, w, e, f, k, s, c in CHECKS:
        arguments = problem(b, h, w, e, f, c)
        tiled(k, s)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        y = conv_mlp(*arguments, backend="triton")
        again = conv_mlp(*arguments, backend="triton")
        torch.use_deterministic_algorithms(False)
        expected, other = exact(*arguments), three(*arguments)
        rows = (y.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
        apart = float((rows > 0.02).double().mean())
        keep = rows <= 0.02
        error = float((y.double() - expected)[keep].norm() / expected[keep].norm()) if keep.any() else float("nan")
        theirs = float((other.double() - expected)[keep].norm() / expected[keep].norm()) if keep.any() else float("nan")
        good = bool(y.isfinite().all()) and torch.equal(y, again) and apart <= (0.01 if 2 in (e, f) else 0) and error < 6e-3
        bad += not good
        print(f"{'ok  ' if good else 'BAD '} {b}x{h}x{w}x{c} experts {e}{f} strips <= {k} stages {s}: error {error:.2e} (three kernels {theirs:.2e}), rows apart {apart:.4f}, "
              f"equal to the three {float((y == other).double().mean()):.3f}, same twice {torch.equal(y, again)}", flush=True)
    print(f"{bad} checks failed; {time.time() - start:.0f} s", flush=True)

    print("\nside channels batch experts | three | three in pieces of 64 | conv_mlp, by tallest strip / stages, us")
    for side, c in ((56, 32), (28, 64)):
        for b in (1, 8, 32, 256):
            for e in (1, 2):
                arguments = problem(b, side, side, e, e, c)
                x, rest = arguments[0], arguments[1:]
                inputs = [(x,)] + [(torch.randn_like(x),) for _ in range(min(8, copies_for([x])) - 1)]
                measure = lambda call: time_call(call, inputs, seconds=0.04, least_calls=8).median_us
                base = measure(lambda x: three(x, *rest))
                pieces = measure(lambda x: torch.cat([three(p, *rest) for p in x.split(64)])) if b > 64 else base
                line, best = [], float("inf")
                for bb, h, w, ee, f, k, s, cc in TIMES:
                    if (bb, ee, cc) == (b, e, c):
                        tiled(k, s)
                        try:
                            us = measure(lambda x: conv_mlp(x, *rest, backend="triton"))
                        except Exception as problem_:
                            line.append(f"{k}/{s} {type(problem_).__name__}: {str(problem_)[:80]}")
                            continue
                        best = min(best, us)
                        line.append(f"{k}/{s} {us:.1f}")
                print(f"{side} {c} {b:5d} {e} | {base:.1f} | {pieces:.1f} | {'  '.join(line)} | best {best:.1f}, {base / best:.2f}x", flush=True)
    print(f"{time.time() - start:.0f} s in all")


if __name__ == "__main__":
    if "--compile" in sys.argv:
        number = int(sys.argv[sys.argv.index("--compile") + 1])
        for job in jobs()[number::WORKERS]:
            try:
                run_job(job)
            except Exception as problem_:
                print(f"{job}: {type(problem_).__name__}: {str(problem_)[:300]}", flush=True)
    else:
        main()
