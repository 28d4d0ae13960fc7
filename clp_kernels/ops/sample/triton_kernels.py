"""The Triton kernels that clp_kernels.ops.sample.triton launches. Unverified on a GPU.

A row is cut into slices by its vocabulary alone, and what its slices find goes through partials
that are combined in order: a row's bits depend on nothing but that row. The score of an id that may
be drawn is float64, as the reference's, and so are the masses of filters: one token decides a draw,
and a set of them must equal the reference's. Which few ids of a slice may be drawn, float32 tells.
Launch them without fused multiply-add, see clp_kernels.ops.mix_logits.triton_kernels.
"""

import triton
import triton.language as tl

from clp_kernels.ops.mix_logits.triton_kernels import COUNTS, mixed

# A filter's threshold is found digit by digit, DIGIT bits at a time, ROUNDS digits in all.
DIGIT = tl.constexpr(4)
ROUNDS = tl.constexpr(8)
# Partials of a filter that are added up at a time.
CHUNK = tl.constexpr(32)
LOG2E = tl.constexpr(1.4426950408889634)
# Ids whose scores are taken one by one.
FEW = tl.constexpr(16)
NO_ID = tl.constexpr(2147483647)


@triton.jit
def _divisor(temperature):
    """What logits are divided by, in float64: 1 where the row is greedy, else at least 1e-30."""
    return tl.where(temperature == 0, 1.0, tl.maximum(temperature.to(tl.float64), 1e-30))


@triton.jit
def _order_key(z):
    """float32 as an integer in [0, 2^32) of the same order; both zeros have one key."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -1 - bits, bits + 2147483648)


@triton.jit
def philox_words(seed, position, slice_id, BLOCK: tl.constexpr):
    """The 32 random bits of the ids of a slice, uint32 [BLOCK]; one Philox call serves four ids."""
    quads = (slice_id * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = quads * 0
    low = zero + (position & 0xFFFFFFFF).to(tl.uint32)
    high = zero + ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    x0, x1, x2, x3 = tl.philox(seed, quads, low, high, zero)
    return tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))


@triton.jit
def gumbel(words):
    """The noise of an id, float64: -log(-log(u)), u = (x + 0.5) / 2^32.

    u is exact, so log(u) has full precision also where u is near 1.
    """
    uniform = (words.to(tl.float64) + 0.5) * 2.3283064365386963e-10
    return -tl.log(-tl.log(uniform))


@triton.jit
def _powers(z, top, temperature):
    """exp((z - top) / temperature) in float32, 0 below 2^-125.

    log2(e) / temperature is used as two floats: one alone is off in the same direction for all ids.
    """
    scale = tl.full((), LOG2E, tl.float64) / temperature
    high = scale.to(tl.float32)
    low = (scale - high.to(tl.float64)).to(tl.float32)
    floor = tl.maximum(-125.5 / scale, -3e38).to(tl.float32)
    d = tl.maximum(z - top, floor)
    return tl.where(d == floor, 0.0, tl.exp2(d * high + d * low))


@triton.jit
def _contenders(words, powers, kept, top):
    """The ids that may have the best score: one or two of a slice, seldom more.

    z / t + g is the larger, the smaller -log(u) / exp(z / t) is, and 1 - u <= -log(u) <=
    (1 - u) / u. So the least upper bound of a slice leaves few ids, and the float64 logarithms of
    all others need not be taken. Of the room above it 1e-3 covers the float32 numbers here, whose
    errors are below 1e-5, and 2^-49 of the largest score the ties of huge ones, in whose sum the
    noise is lost.
    """
    # 1 - u in units of 2^-32, rounded down and up.
    short = (4294967295 - words.to(tl.int64)).to(tl.float32)
    above = short + 1.0
    # An id so far below the largest loses with the largest noise against it with the smallest.
    possible = kept & (powers >= 4.8e-12)
    divisor = tl.where(possible, powers, 1.0)
    bound = above / (divisor * tl.maximum(1.0 - above * 2.3283064365386963e-10, 0.0))
    bound = tl.min(tl.where(possible, bound, float("inf")), axis=0)
    room = tl.minimum(tl.abs(top) * 1.7763568394002505e-15 + 1e-3, 60.0).to(tl.float32)
    return possible & (short / divisor <= bound * tl.exp(room))


@triton.jit(do_not_specialize=COUNTS)
def partials_kernel(
    logits_ptr, weights_ptr, log_norms_ptr, temperature_ptr, seed_ptr, position_ptr, rows_ptr,
    least_ptr, min_p_ptr, parts_ptr, vocab_size, term_stride, row_stride, batch_size, num_terms,
    slices,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """parts[k, b, slice] of the kept ids of a slice, float64.

    k = 0: the maximum of z over all its ids, +inf where one is NaN or +inf.
    k = 1: sum exp((z - that maximum) / temperature) over the kept, summed in float32.
    k = 2, 3, 4, unless seed_ptr is None: the best score, its id (the lowest on ties) and its z.

    Kept are ids with key(z) >= least[b] and with p >= min_p[b] p_max, where these are given;
    rows[0, b] is then the maximum of the row, which is always kept. seed_ptr and position_ptr,
    least_ptr, min_p_ptr may be None.
    """
    pid = tl.program_id(0).to(tl.int64)
    b, slice_id = pid // slices, (pid % slices).to(tl.int32)
    v = slice_id * BLOCK + tl.arange(0, BLOCK)
    z = mixed(
        logits_ptr, weights_ptr, log_norms_ptr, b, v, vocab_size, term_stride, row_stride,
        batch_size, num_terms,
    )  # fmt: skip
    z = tl.where(z < float("inf"), z, float("inf"))
    z = tl.where(v < vocab_size, z, float("-inf"))
    temperature = tl.load(temperature_ptr + b)
    divisor = _divisor(temperature)
    kept = v < vocab_size
    if least_ptr is not None:
        # No threshold is above the maximum, whatever top_p holds.
        highest = _order_key(tl.load(rows_ptr + b).to(tl.float32))
        kept = kept & (_order_key(z) >= tl.minimum(tl.load(least_ptr + b), highest))
    if min_p_ptr is not None:
        min_p = tl.load(min_p_ptr + b).to(tl.float64)
        off = min_p <= 0
        log_min_p = tl.where(off, float("-inf"), tl.log(tl.where(off, 1.0, min_p)))
        kept = kept & ((z.to(tl.float64) - tl.load(rows_ptr + b)) / divisor >= log_min_p)

    maximum = tl.max(z, axis=0)
    finite = tl.abs(maximum) < float("inf")
    powers = _powers(z, tl.where(finite, maximum, 0.0), divisor)
    count = tl.cast(batch_size, tl.int64) * slices
    tl.store(parts_ptr + pid, maximum.to(tl.float64))
    mass = tl.sum(tl.where(kept, powers, 0.0), axis=0)
    tl.store(parts_ptr + count + pid, tl.where(finite, mass, 0.0).to(tl.float64))
    if seed_ptr is not None:
        words = philox_words(tl.load(seed_ptr + b), tl.load(position_ptr + b), slice_id, BLOCK)
        greedy = temperature == 0
        near = _contenders(words, powers, kept, maximum.to(tl.float64) / divisor)
        found = tl.where(greedy, z == maximum, near) & kept
        best = tl.cast(float("-inf"), tl.float64)
        token, logit = slice_id * BLOCK, tl.cast(float("-inf"), tl.float32)
        if tl.sum(found.to(tl.int32), axis=0) > FEW:  # ties, or logits that hide the noise
            score = tl.where(greedy, z.to(tl.float64), z.to(tl.float64) / divisor + gumbel(words))
            score = tl.where(found, score, float("-inf"))
            best = tl.max(score, axis=0)
            token = tl.min(tl.where(score == best, v, NO_ID), axis=0)
            logit = tl.max(tl.where(v == token, z, float("-inf")), axis=0)
        else:
            at = tl.min(tl.where(found, v, NO_ID), axis=0)
            while at < NO_ID:
                z_here = tl.max(tl.where(v == at, z, float("-inf")), axis=0)
                noise = gumbel(tl.max(tl.where(v == at, words.to(tl.int64), 0), axis=0))
                wide = z_here.to(tl.float64)
                score = tl.where(greedy, wide, wide / divisor + noise)
                # Ids come in ascending order: of equal scores the first stays.
                better = score > best
                token = tl.where(better, at, token)
                logit = tl.where(better, z_here, logit)
                best = tl.where(better, score, best)
                at = tl.min(tl.where(found & (v > at), v, NO_ID), axis=0)
        tl.store(parts_ptr + 2 * count + pid, best)
        tl.store(parts_ptr + 3 * count + pid, token.to(tl.float64))
        tl.store(parts_ptr + 4 * count + pid, logit.to(tl.float64))


@triton.jit(do_not_specialize=COUNTS)
def combine_kernel(
    parts_ptr, temperature_ptr, rows_ptr, tokens_ptr, logprobs_ptr, filtered_ptr, batch_size,
    slices,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Combines the partials of a row. Without tokens_ptr: rows[0, b] = maximum, [1, b] = total.

    With it: the token and its log-probabilities, the full one by the total in `rows`, the filtered
    one by the partials'. Without rows_ptr nothing was filtered.
    """
    b = tl.program_id(0).to(tl.int64)
    count = tl.cast(batch_size, tl.int64) * slices
    temperature = tl.load(temperature_ptr + b)
    divisor = _divisor(temperature)
    maximum = tl.cast(float("-inf"), tl.float64)
    for start in range(0, slices, BLOCK):
        s = start + tl.arange(0, BLOCK)
        part = parts_ptr + b * slices + s
        peaks = tl.load(part, mask=s < slices, other=float("-inf"))
        maximum = tl.maximum(maximum, tl.max(peaks, axis=0))
    finite = tl.abs(maximum) < float("inf")
    shift = tl.where(finite, maximum, 0.0) / divisor

    total = tl.cast(0.0, tl.float64)
    best = tl.cast(float("-inf"), tl.float64)
    token = tl.cast(0.0, tl.float64)
    logit = tl.cast(0.0, tl.float64)
    for start in range(0, slices, BLOCK):
        s = start + tl.arange(0, BLOCK)
        part = parts_ptr + b * slices + s
        peaks = tl.load(part, mask=s < slices, other=float("-inf"))
        sums = tl.load(part + count, mask=s < slices, other=0.0)
        scale = tl.exp(tl.minimum(peaks / divisor - shift, 0.0))
        total += tl.sum(tl.where(sums > 0, sums * scale, 0.0), axis=0)
        if tokens_ptr is not None:
            scores = tl.load(part + 2 * count, mask=s < slices, other=float("-inf"))
            ids = tl.load(part + 3 * count, mask=s < slices, other=float("inf"))
            logits = tl.load(part + 4 * count, mask=s < slices, other=float("-inf"))
            score = tl.max(scores, axis=0)
            lowest = tl.min(tl.where(scores == score, ids, float("inf")), axis=0)
            # Slices come in ascending order: a later equal score has a higher id.
            better = score > best
            token = tl.where(better, lowest, token)
            drawn = tl.max(tl.where(ids == lowest, logits, float("-inf")), axis=0)
            logit = tl.where(better, drawn, logit)
            best = tl.where(better, score, best)
    if tokens_ptr is None:
        tl.store(rows_ptr + b, maximum)
        tl.store(rows_ptr + batch_size + b, total)
    else:
        good = finite & (temperature >= 0) & (temperature < float("inf"))
        relative = tl.where(good, logit, 0.0) / divisor - shift
        filtered = relative - tl.log(tl.where(good, total, 1.0))
        full = filtered
        if rows_ptr is not None:
            all_mass = tl.load(rows_ptr + batch_size + b)
            full = relative - tl.log(tl.where(good, all_mass, 1.0))
        filtered = tl.where(temperature == 0, 0.0, filtered)
        tl.store(tokens_ptr + b, tl.where(good, token, -1.0).to(tl.int64))
        tl.store(logprobs_ptr + b, tl.where(good, full, float("nan")).to(tl.float32))
        tl.store(filtered_ptr + b, tl.where(good, filtered, float("nan")).to(tl.float32))


@triton.jit(do_not_specialize=["batch_size", "slices", "round_id"])
def narrow_kernel(
    z_ptr, temperature_ptr, rows_ptr, top_k_ptr, top_p_ptr, least_ptr, prefix_ptr, amounts_ptr,
    parts_ptr, vocab_size, batch_size, slices, round_id,
    BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One digit of the smallest key above which there is less than a row needs.

    Amounts are counts (top_k_ptr; needed: k) or masses exp((z - max) / temperature) (top_p_ptr;
    needed: top_p of the mass of all ids with key >= least[b], or of all). Round r = 0, 1, ...
    first adds up the sums of round r - 1, which fixes digit r - 1, then sums the amounts of the
    ids whose higher digits are those found, by their digit r. Every program of a row adds up the
    same sums in the same order, so all find the same digit; the first one notes it. Round ROUNDS
    has one program per row and only notes the key: prefix[ROUNDS, b], at least least[b].

    prefix [ROUNDS + 1, B] int64, amounts [2, ROUNDS + 1, B] float64 (what is above, what is
    needed), parts [2, B, slices, 16] float64, written in even and in odd rounds.
    """
    pid = tl.program_id(0).to(tl.int64)
    b, slice_id = pid % batch_size, (pid // batch_size).to(tl.int32)
    bins = tl.arange(0, 16)
    rows = tl.cast(batch_size, tl.int64)
    if top_k_ptr is not None:
        top_k = tl.load(top_k_ptr + b).to(tl.float64)
        limit = tl.where(top_k <= 0, float("inf"), top_k)
    else:
        top_p = tl.load(top_p_ptr + b).to(tl.float64)
        limit = tl.where(top_p >= 1, float("inf"), top_p)

    prefix = tl.cast(0, tl.int64)
    above = tl.cast(0.0, tl.float64)
    need = limit
    if round_id > 0:
        sums = tl.full((16,), 0.0, tl.float64)
        old = parts_ptr + (((round_id - 1) % 2) * rows + b) * slices * 16
        for start in range(0, slices, CHUNK):
            s = start + tl.arange(0, CHUNK)
            places = old + s[:, None] * 16 + bins[None, :]
            sums += tl.sum(tl.load(places, mask=(s < slices)[:, None], other=0.0), axis=0)
        before = (round_id - 1) * rows + b
        prefix = tl.load(prefix_ptr + before)
        above = tl.load(amounts_ptr + before)
        if top_p_ptr is not None:
            if round_id == 1:
                need = limit * tl.sum(sums, axis=0)
            else:
                need = tl.load(amounts_ptr + (ROUNDS + 1) * rows + before)
        greater = bins[None, :] > bins[:, None]
        higher = tl.sum(tl.where(greater, sums[None, :], 0.0), axis=1)
        # The digits with less than `need` above them are the last ones; at least 15 is.
        digit = 16 - tl.maximum(tl.sum((above + higher < need).to(tl.int32), axis=0), 1)
        above += tl.sum(tl.where(bins > digit, sums, 0.0), axis=0)
        prefix = prefix * 16 + digit
    least = tl.cast(0, tl.int64)
    if least_ptr is not None:
        least = tl.load(least_ptr + b)
    if slice_id == 0:
        now = round_id * rows + b
        final = tl.where(round_id == ROUNDS, tl.maximum(prefix, least), prefix)
        tl.store(prefix_ptr + now, final)
        tl.store(amounts_ptr + now, above)
        tl.store(amounts_ptr + (ROUNDS + 1) * rows + now, need)

    if round_id < ROUNDS:
        place = DIGIT * (ROUNDS - 1 - round_id)
        divisor = _divisor(tl.load(temperature_ptr + b))
        shift = tl.load(rows_ptr + b) / divisor
        sums = tl.full((16,), 0.0, tl.float64)
        begin = slice_id * TILES * BLOCK
        for start in range(begin, tl.minimum(begin + TILES * BLOCK, vocab_size), BLOCK):
            v = start + tl.arange(0, BLOCK)
            inside = v < vocab_size
            z = tl.load(z_ptr + b * vocab_size + v, mask=inside, other=float("-inf"))
            key = _order_key(z)
            counts = inside & (key >> (place + DIGIT) == prefix) & (key >= least)
            if top_k_ptr is not None:
                amount = tl.where(counts, 1.0, 0.0).to(tl.float64)
            else:
                mass = tl.exp(tl.minimum(z.to(tl.float64) / divisor - shift, 0.0))
                amount = tl.where(counts, mass, 0.0)
            digits = ((key >> place) & 15).to(tl.int32)
            hits = digits[:, None] == bins[None, :]
            sums += tl.sum(tl.where(hits, amount[:, None], 0.0), axis=0)
        new = parts_ptr + (((round_id % 2) * rows + b) * slices + slice_id) * 16
        tl.store(new + bins, sums)
