"""Check `attn_block` on this GPU, then time it against the four kernels it stands for. About a minute, most of it compiling."""

import math
import os
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from shiftaddvit.ops.attn_block import attn_block
from shiftaddvit.ops.attn_block import triton as launches
from shiftaddvit.ops.linear_attention import attention_encode, attention_mix
from shiftaddvit.ops.norm_linear import route_rows
from shiftaddvit.ops.tiling import Tile
from shiftaddvit.ops.timing import copies_for, time_call

WORKERS = max(1, min(16, (os.cpu_count() or 2) - 1))
# Forms of a kernel: tokens a step of a program, and whether products are each warp's (1) or those of four warps (2).
FORMS = {32: ((64, 1), (64, 2), (128, 1), (128, 2)), 64: ((64, 1), (64, 2))}
STAGES = ((3136, 32), (784, 64))
# batch, tokens, channels, experts of qkv, of proj, tokens a step, kind of products, longest run of the second kernel.
CHECKS = [(b, n, c, e, f, m, s, k) for (b, n) in ((1, 49), (3, 784), (2, 117)) for c in (32, 64) for (m, s) in FORMS[c]
          for (e, f, k) in ((1, 1, 64), (2, 2, 2))]
CHECKS += [(3, 3136, 32, 2, 2, m, s, 16) for m, s in FORMS[32]]
CHECKS += [(32, 3136, 32, 2, 1, 64, 1, 8), (2, 63, 32, 1, 2, 64, 1, 1), (16, 784, 64, 2, 2, 64, 1, 4)]
# Longest runs by batch: contexts', then the second kernel's.
RUNS = {1: ((4,), (1, 2)), 8: ((4, 8), (2, 4)), 32: ((4, 8), (4, 8, 16)), 256: ((8, 16), (8, 16, 32))}


def problem(batch, tokens, channels, first, second, dtype=torch.bfloat16, seed=0):
    """Arguments of `attn_block`."""
    g = torch.Generator(device="cuda").manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, device="cuda", generator=g)
    x = normal(batch, tokens, channels).to(dtype)
    linear = lambda e, n: ((normal(e, n, channels) * channels**-0.5).half(), normal(e, n) * 0.5,
                           route_rows(normal(2, channels), torch.float16) if e == 2 else None)
    norm, conv = (normal(channels) + 1, normal(channels)), normal(channels // 32, 9) * 0.3
    return x, channels // 32, norm, 1e-6, linear(first, 3 * channels), conv, linear(second, channels)


def four(x, heads, norm, eps, qkv, conv, proj):
    encoded = attention_encode(x, qkv[0], heads, qkv[1], norm, eps, qkv[2])
    return attention_mix(encoded, *proj, residual=x, conv=conv)[0]


def exact(x, heads, norm, eps, qkv, conv, proj):
    """In float64, rounded where the kernels round, so that codes and routes are the same."""
    def linear(a, part):
        y = torch.einsum("...k,enk->...en", a, part[0].double()) + part[1].double()
        return y[..., 0, :] if part[2] is None else torch.where((a @ part[2].double().sum(0) > 0).unsqueeze(-1), y[..., 1, :], y[..., 0, :])

    batch, tokens, channels = x.shape
    a = F.layer_norm(x.double(), (channels,), norm[0].double(), norm[1].double(), eps).half().double()
    q, k, v = linear(a, qkv).half().double().unflatten(2, (3, heads, 32)).permute(2, 0, 3, 1, 4)
    q, k = ((t > t.mean(-1, keepdim=True)).double() for t in (q, k))
    o = q @ (k.transpose(2, 3) @ v) / (math.pi * tokens) + v / 2
    o = o / (o.square().sum(-1, keepdim=True) + 1e-12).sqrt()
    o = o + F.conv2d(v, conv.double()[:, None, :, None], padding=(conv.shape[1] // 2, 0), groups=heads)
    return x.double() + linear(o.transpose(1, 2).flatten(2).half().double(), proj)


def tiled(m, s, contexts, longest):
    first, second = Tile(m, 32, contexts, 4), Tile(m, 32, longest, 4, s)
    launches.attn_tile = lambda kernel, *_: first if kernel == "context" else second


def jobs():
    """What must be compiled: each form of the new kernels, and the old ones at the sizes that are timed."""
    out = [("new", (2, n, c, e, f, m, s)) for n, c in STAGES for m, s in FORMS[c] for e, f in ((1, 1), (2, 2))]
    out += [("new", (2, 784, 32, 2, 1, 64, 1)), ("new", (2, 63, 32, 1, 2, 64, 1))]
    # Numbers of tokens that 16 does not divide are kernels of their own.
    out += [("new", (2, 117, c, e, e, m, s)) for c in (32, 64) for m, s in FORMS[c] for e in (1, 2)]
    # The largest first: they take longest.
    out.sort(key=lambda job: -job[1][2] * (job[1][3] + job[1][4]) * job[1][5])
    return out + [("old", (b, n, c, e, e, 0, 0)) for n, c in STAGES for e in (1, 2) for b in (1, 8, 32, 256)]


def run_job(job):
    kind, (b, n, c, e, f, m, s) = job
    arguments = problem(b, n, c, e, f)
    if kind == "old":
        four(*arguments)
    else:
        tiled(m, s, 4, 4)
        attn_block(*arguments, backend="triton")
    torch.cuda.synchronize()


def check():
    bad = 0
    for b, n, c, e, f, m, s, k in CHECKS:
        arguments = problem(b, n, c, e, f)
        tiled(m, s, 4, k)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        y, again = attn_block(*arguments, backend="triton"), attn_block(*arguments, backend="triton")
        torch.use_deterministic_algorithms(False)
        expected, other = exact(*arguments), four(*arguments)
        rows = (y.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
        keep, apart = rows <= 0.02, float((rows > 0.02).double().mean())
        error = float((y.double() - expected)[keep].norm() / expected[keep].norm()) if keep.any() else float("nan")
        theirs = float((other.double() - expected)[keep].norm() / expected[keep].norm()) if keep.any() else float("nan")
        good = bool(y.isfinite().all()) and torch.equal(y, again) and apart <= 0.02 and error < 6e-3
        bad += not good
        print(f"{'ok  ' if good else 'BAD '} {b}x{n}x{c} experts {e}{f} step {m} kind {s} run <= {k}: error {error:.2e} "
              f"(four kernels {theirs:.2e}), rows apart {apart:.4f}, "
              f"equal to the four {float((y == other).double().mean()):.3f}, same twice {torch.equal(y, again)}", flush=True)
    return bad


def alone(arguments):
    """The two new kernels apart, as calls without arguments: of the first the second one is left out, and the other way round."""
    apply, context = launches.attn_apply_kernel, launches.attn_context_kernel
    class Nothing:
        def __getitem__(self, grid):
            return lambda *args, **flags: None

    def call(name, kept):
        def run(x):
            setattr(launches, name, Nothing())
            try:
                attn_block(x, *arguments, backend="triton")
            finally:
                setattr(launches, name, kept)
        return run

    return call("attn_apply_kernel", apply), call("attn_context_kernel", context)


def main():
    start = time.time()
    workers = [subprocess.Popen([sys.executable, __file__, "--compile", str(i)]) for i in range(WORKERS)]
    for worker in workers:
        worker.wait()
    print(f"{len(jobs())} problems compiled in {time.time() - start:.0f} s by {WORKERS} processes; torch {torch.__version__}, "
          f"{torch.cuda.get_device_name()}", flush=True)
    print(f"{check()} checks failed; {time.time() - start:.0f} s\n", flush=True)

    print("tokens channels batch experts | four kernels | attn_block: step/kind/run of contexts/run, us = first + second kernel", flush=True)
    for n, c in STAGES:
        for b, (contexts, lengths) in RUNS.items():
            for e in (1, 2):
                x, *rest = problem(b, n, c, e, e)
                inputs = [(x,)] + [(torch.randn_like(x),) for _ in range(min(8, copies_for([x])) - 1)]
                measure = lambda call: time_call(call, inputs, seconds=0.012, least_calls=8).median_us
                base, line = measure(lambda x: four(x, *rest)), []
                first, second = alone(rest)
                for m, s in FORMS[c]:
                    try:
                        # The first kernel has one kind of products only.
                        ones = {} if s == 1 else ones
                        for k in contexts if s == 1 else ():
                            tiled(m, s, k, 16)
                            ones[k] = measure(first)
                        twos = {}
                        for k in lengths:
                            tiled(m, s, contexts[-1], k)
                            twos[k] = measure(second)
                        k1, k2 = min(ones, key=ones.get), min(twos, key=twos.get)
                        tiled(m, s, k1, k2)
                        both = measure(lambda x: attn_block(x, *rest, backend="triton"))
                        show = lambda times: " ".join(f"{k}:{us:.1f}" for k, us in times.items())
                        line.append((both, f"{m}/{s} {both:.1f} (contexts {show(ones)}; rest {show(twos)})"))
                    except Exception as problem_:
                        line.append((math.inf, f"{m}/{s} {type(problem_).__name__}: {str(problem_)[:80]}"))
                best = min(line)[0]
                forms = " | ".join(text for _, text in line)
                print(f"{n} {c} {b:4d} {e} | {base:.1f} | best {best:.1f}, {base / best:.2f}x | {forms}", flush=True)
    print(f"{time.time() - start:.0f} s in all")


if __name__ == "__main__":
    if "--compile" in sys.argv:
        for job in jobs()[int(sys.argv[sys.argv.index("--compile") + 1]) :: WORKERS]:
            try:
                run_job(job)
            except Exception as problem_:
                print(f"{job}: {type(problem_).__name__}: {str(problem_)[:300]}", flush=True)
    else:
        main()
