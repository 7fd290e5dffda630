"""Level 3: what other implementations lack or get wrong, each as a case of its own.

Some cases build scores by hand: with `k_cmp` the unit vectors and `scale=1`, the entries of a
query are its logits over the compressed blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nsa_port import functional
from nsa_port.conformance import hold
from nsa_port.conformance.case import Case, Context
from nsa_port.conformance.inputs import COMPACT, Inputs, Shape, make, run
from nsa_port.conformance.level1 import inputs
from nsa_port.conformance.level3 import both_ways
from nsa_port.kernels.geometry import NSAConfig

_NEGLIGIBLE = -30.0
_ONE_TO_ONE = NSAConfig(16, 16, 16, 4, init_blocks=1, local_blocks=2, window_size=16)
"""A selection block is a compressed block, so that its score is that block's probability."""


def by_hand(context: Context, logits: Tensor, num_keys: int, cfg: NSAConfig) -> Tensor:
    """The blocks chosen by the last query of each batch entry, given logits `[B, H, C]`."""
    B, _, C = logits.shape
    assert cfg.num_compressed(num_keys) == C
    keys = torch.eye(C).expand(B, 1, C, C).transpose(1, 2)
    q, k_cmp = (t.to(context.device, context.dtype) for t in (logits[:, None], keys))
    where = {"num_keys": num_keys, "scale": 1.0, "backend": context.name}
    _, lse = functional.compressed_attention(q, k_cmp, k_cmp, cfg, **where)  # type: ignore[arg-type]
    chosen = functional.select_blocks(q, k_cmp, lse, cfg, **where)  # type: ignore[arg-type]
    return chosen[:, 0, 0].cpu()


def expect(context: Context, label: str, chosen: Tensor, expected: Sequence[int]) -> None:
    got = [block for block in chosen.tolist() if block >= 0]
    context.require(got == list(expected), f"{label}: chose blocks {got}, not {list(expected)}")


def _own_block(context: Context) -> None:
    """Change each later token of the query's own selection block; the query must not notice."""
    given = inputs(context, Shape(T=96, H=2, HK=1))
    block = range(64, 96)
    before = run(given, context.name)
    for p in (64, 70, 79, 94):
        changed = given.map(lambda tensor: tensor.clone())
        for name in ("k_slc", "v_slc", "k_win", "v_win"):
            getattr(changed, name)[:, p + 1 : block.stop] += 50
        after = run(changed, context.name)
        context.same(f"row {p}, later keys of its block changed", after.out[:, p], before.out[:, p])


def _heads_disagree(context: Context) -> None:
    """One head prefers block 1, the other 2; together they prefer 3."""
    logits = torch.full((1, 2, 8), _NEGLIGIBLE)
    logits[0, 0, [1, 3]] = torch.tensor([0.5, 0.4]).log()
    logits[0, 1, [2, 3]] = torch.tensor([0.5, 0.4]).log()
    chosen = by_hand(context, logits, 128, _ONE_TO_ONE)
    expect(context, "heads prefer 1 and 2, their sum 3", chosen[0], [0, 3, 6, 7])
    hold.forward(context, inputs(context, Shape(T=200, H=12, HK=2)))


def _equation_9(context: Context) -> None:
    """Probability `a` on one of the five compressed blocks that overlap block 1, the rest in the
    middle of block 4. Which of the two wins brackets the weight."""
    cfg = NSAConfig(32, 16, 64, 4, init_blocks=1, local_blocks=2, window_size=16)
    num_keys, first = 576, 3  # of the blocks that overlap selection block 1: 4 * 1 - 1
    weights = (1, 2, 2, 2, 1)
    settings = []
    for at, weight in enumerate(weights):
        even = 2 / (weight + 2)  # here both blocks would score the same
        settings += [(at, even - 0.05, 4), (at, even + 0.05, 1)]
    logits = torch.full((len(settings), 1, cfg.num_compressed(num_keys)), _NEGLIGIBLE)
    for row, (at, a, _) in enumerate(settings):
        logits[row, 0, first + at], logits[row, 0, 4 * 4 + 1] = math.log(a), math.log(1 - a)
    chosen = by_hand(context, logits, num_keys, cfg)
    for row, (at, a, winner) in enumerate(settings):
        label = f"p_cmp = {a:.2f} on block {first + at}, {1 - a:.2f} on block 17"
        expect(context, label, chosen[row], [0, winner, 7, 8])
    one_hot = torch.full((1, 1, cfg.num_compressed(num_keys)), _NEGLIGIBLE)
    one_hot[..., 4 * 3 - 1] = 0  # overlaps blocks 2 and 3 equally: the lower wins
    expect(context, "one-hot p_cmp", by_hand(context, one_hot, num_keys, cfg)[0], [0, 2, 7, 8])


def _literal_equation_9(context: Context) -> None:
    """The equation read with 0-based indices: blocks `4j - 4 .. 4j`."""
    cfg = NSAConfig(32, 16, 64, 4, 1, 2, window_size=16, score_map="literal")
    logits = torch.full((3, 1, cfg.num_compressed(576)), _NEGLIGIBLE)
    for row, block in enumerate((8, 13, 20)):
        logits[row, 0, block] = 0
    chosen = by_hand(context, logits, 576, cfg)
    for row, expected in enumerate((2, 4, 5)):
        expect(context, f"one-hot p_cmp, row {row}", chosen[row], [0, expected, 7, 8])
    hold.forward(context, inputs(context, Shape(cfg=replace(COMPACT, score_map="literal"))))


def _wide_logits(context: Context) -> None:
    given = inputs(context, Shape(T=200))
    largest = max(
        float(torch.einsum("bthd,bsd->bths", given.q.double(), k[:, :, 0].double()).abs().max())
        for k in (given.k_slc, given.k_win, given.k_cmp)
    )
    spread = replace(given, scale=200.0 / largest)
    hold.both_ways(context, spread)


def _rising_maximum(context: Context) -> None:
    """Each block's largest logit exceeds all before it, or falls below them."""
    for label, order in (("rising", 1), ("falling", -1)):
        given = inputs(context, Shape(T=1, S=235))
        ramp = torch.linspace(0.1, 6.0, 235, device=context.device)
        factor = (ramp if order > 0 else ramp.flip(0))[None, :, None, None].to(context.dtype)
        with context.under(f"{label} logits"):
            hold.forward(
                context, replace(given, k_slc=given.k_slc * factor, k_win=given.k_win * factor)
            )


def _prefill_and_decode(context: Context) -> None:
    shape = Shape(T=600, H=2, HK=1, cfg=NSAConfig(num_selected=6, window_size=512))
    prefill = make(shape, context.dtype, context.device)
    decode = last_rows(prefill, 1)
    whole, last = hold.forward(context, prefill), hold.forward(context, decode)
    context.same("the blocks that the last row chooses", last.indices[:, 0], whole.indices[:, -1])


def last_rows(given: Inputs, count: int) -> Inputs:
    """The same call for only the last `count` queries."""
    return replace(given, q=given.q[:, -count:], gates=given.gates[:, -count:])


def _two_configs(context: Context) -> None:
    given = inputs(context, Shape(T=200))
    other = replace(given, cfg=replace(COMPACT, num_selected=3, window_size=17))
    first = run(given, context.name)
    hold.forward(context, other)
    again = run(given, context.name)
    context.same("out after a call with another n and w", again.out, first.out)
    hold.forward(context, given)


def _small_scores(context: Context) -> None:
    """Scores of 1e-4 to 1e-3 that differ by 0.2%: a score of 16 bits cannot tell them apart.

    The logits are multiples of 2^-9, exact in every dtype; one forced block holds nearly all the
    probability. Every n draws the line between two other neighbours.
    """
    blocks = 128
    generator = torch.Generator().manual_seed(8)
    rank = torch.randperm(blocks, generator=generator)
    logits = (rank / 512.0)[None, None].clone()
    logits[..., 0] = 8.0
    p = logits.double().softmax(-1)[0, 0, 1:]
    assert 1e-4 < float(p.min()) < float(p.max()) < 1e-3
    candidates = sorted(range(1, blocks - 2), key=lambda block: -int(rank[block]))
    for free in range(4, 20):
        cfg = replace(_ONE_TO_ONE, num_selected=free + 3)
        chosen = by_hand(context, logits, blocks * 16, cfg)
        expected = sorted([0, *candidates[:free], blocks - 2, blocks - 1])
        expect(context, f"the {free} best of 125", chosen[0], expected)


def _underflow(context: Context) -> None:
    """Blocks whose probability underflows to 0 are still candidates; later blocks never are."""
    blocks = 10
    logits = torch.full((1, 1, blocks), -300.0)
    logits[..., 0] = 0.0
    few = by_hand(context, logits, blocks * 16, replace(_ONE_TO_ONE, num_selected=12))
    expect(context, "10 candidates, n = 12", few[0], range(10))
    many = by_hand(context, logits, blocks * 16, replace(_ONE_TO_ONE, num_selected=5))
    expect(context, "10 candidates of score 0, n = 5", many[0], [0, 1, 2, 8, 9])
    given = inputs(context, Shape(T=230))
    hold.forward(context, replace(given, scale=60.0))


def _ties(context: Context) -> None:
    """Equal scores: the lower block wins."""
    logits = torch.zeros(1, 3, 12)
    chosen = by_hand(context, logits, 12 * 16, replace(_ONE_TO_ONE, num_selected=6))
    expect(context, "all scores equal", chosen[0], [0, 1, 2, 3, 10, 11])
    logits[..., 5:7] = 1.0
    chosen = by_hand(context, logits, 12 * 16, replace(_ONE_TO_ONE, num_selected=6))
    expect(context, "two blocks ahead, the others equal", chosen[0], [0, 1, 5, 6, 10, 11])


def _short_and_empty(context: Context) -> None:
    for T in (1, 2, COMPACT.block_size - 1, COMPACT.block_size, COMPACT.block_size + 1):
        with context.under(f"T={T}"):
            both_ways(Shape(T=T, B=2))(context)
    with context.under("one long sequence between empty ones"):
        both_ways(Shape(lengths=((0, 0), (77, 77), (0, 0))))(context)
    with context.under("sequences of one token"):
        both_ways(Shape(lengths=((1, 1),) * 20))(context)
    for label, shape in (
        ("T = S = 0", Shape(T=0)),
        ("no queries", Shape(T=0, S=50)),
        ("only empty sequences", Shape(lengths=((0, 0), (0, 0)))),
        ("empty batch", Shape(T=40, B=0)),
    ):
        with context.under(label):
            given = inputs(context, shape).leaves()
            out = hold.function(context, given)
            context.require(
                out.shape == (*given.q.shape[:3], given.v_slc.shape[3]), f"out is {out.shape}"
            )
            for grad in torch.autograd.grad(out.sum(), given.tensors):
                context.require(not grad.any(), "a gradient of nothing is not 0")


def _groups(context: Context) -> None:
    sizes = (1, 5, 12, 16, 64) if context.slow else (1, 2, 5, 12, 16, 64)
    if context.slow:
        context.note("G=2 is what the other cases have here")
    for G in sizes:
        with context.under(f"G={G}"):
            both_ways(Shape(T=110, H=G if G > 16 else 2 * G, HK=1 if G > 16 else 2))(context)


def _block_counts(context: Context) -> None:
    for label, cfg, T in (
        ("n=12", NSAConfig(16, 8, 16, 12, window_size=32), 260),
        ("m=16 with n=16", NSAConfig(16, 8, 16, 16, window_size=32), 330),
    ):
        with context.under(label):
            both_ways(Shape(T=T, H=2, HK=1, cfg=cfg))(context)


def _case(name: str, title: str, check: Callable[[Context], None], shows: str, row: str) -> Case:
    return Case(name, 3, title, shows, check, peers=row)


CASES = (
    _case(
        "own-block-is-causal",
        "A later key inside the query's own block changes nothing",
        _own_block,
        "training leaks the future",
        "a later key inside the query's own block must not change the output",
    ),
    _case(
        "heads-prefer-different-blocks",
        "The group's heads prefer different blocks: Eq. 10's sum decides",
        _heads_disagree,
        "one head decides for its group",
        "the group's heads prefer different blocks: Eq. 10's sum decides",
    ),
    _case(
        "eq9-weights",
        "Eq. 9 weights 1, 2, 2, 2, 1",
        _equation_9,
        "blocks are scored by the wrong compressed blocks",
        "Eq. 9 weights 1,2,2,2,1 with a one-hot p_cmp",
    ),
    _case(
        "eq9-literal",
        "Eq. 9 with score_map='literal'",
        _literal_equation_9,
        "the other reading of Eq. 9 is not what it says",
        "Eq. 9 weights 1,2,2,2,1 with a one-hot p_cmp",
    ),
    _case(
        "logits-spread-by-200",
        "Logits from -200 to 200",
        _wide_logits,
        "softmax overflows",
        "logits spread by +-200 over selected blocks",
    ),
    _case(
        "decode-rising-maximum",
        "Decode over several blocks with a rising maximum",
        _rising_maximum,
        "running maxima are not rescaled",
        "decode with several selected blocks and a rising maximum",
    ),
    _case(
        "custom-scale",
        "A custom scale in all branches",
        both_ways(Shape(T=200, scale=0.37)),
        "a branch ignores scale",
        "a custom `scale` in all branches",
    ),
    _case(
        "prefill-last-row-is-decode",
        "Prefill's last row = decode, w=512, T=600",
        _prefill_and_decode,
        "the window has w keys in one and w + 1 in the other",
        "prefill's last row = decode, w=512, T=600",
    ),
    _case(
        "two-configs-in-one-process",
        "Two layers with different n and w in one process",
        _two_configs,
        "the first config is used for all",
        "two layers with different n or w in one process",
    ),
    _case(
        "small-scores-rank-exactly",
        "Small distinct scores rank exactly",
        _small_scores,
        "scores are kept in too few bits",
        "small distinct scores 1e-4..1e-3 rank exactly",
    ),
    _case(
        "underflowing-blocks",
        "Visible blocks whose probability underflows to 0",
        _underflow,
        "a score of 0 is taken for 'not visible'",
        "a visible block whose p underflows to 0, candidates <= n",
    ),
    _case(
        "ties-go-to-the-lower-block",
        "Ties go to the lower block",
        _ties,
        "equal scores are chosen at random",
        "",
    ),
    _case(
        "short-and-empty",
        "Sequences shorter than a block, of one token, and empty ones",
        _short_and_empty,
        "NaN or an illegal access",
        "T < l, empty sequences, T not a multiple of m or d; varlen edges",
    ),
    _case(
        "groups",
        "Every group size of 1, 2, 5, 12, 16, 64",
        _groups,
        "only some ratios of heads run",
        "G in {1, 2, 5, 12, 16, 64}",
    ),
    _case(
        "dk-192-dv-128",
        "Dk=192, Dv=128, forward and backward",
        both_ways(Shape(T=130, H=4, HK=1, Dk=192, Dv=128)),
        "the paper's head dimensions do not run",
        "Dk=192, Dv=128 forward and backward, unpadded",
    ),
    _case(
        "n-12-and-m-16",
        "n=12, and m=16 with n=16",
        _block_counts,
        "only powers of two, or few blocks, run",
        "n=12; m=16 with n=16",
    ),
    _case(
        "fewer-queries-than-keys",
        "T < S with backward: chunked prefill in training",
        both_ways(Shape(T=61, S=235, B=2)),
        "queries are taken for the first tokens",
        "T < S with backward (chunked prefill in training)",
    ),
)
