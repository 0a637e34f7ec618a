/* One AdEMAMix update over a list of segments, in one read and one write of memory, and the norm of their gradients in
 * one read.
 *
 * The arithmetic of the update is ademamix_update's (update.py), operation for operation: each line rounds where that
 * one does, fused multiply-adds included. native.py says what differs. No header is needed, neither Python's nor
 * torch's. */

typedef long long i64;
typedef unsigned int u32;
typedef unsigned short u16;

/* The elements of a segment from `begin` on are those of a parameter from `start` on: rounding.py's range_table. */
struct element_range {
    i64 begin, start, salt, other_salt;
};

/* One row of ten 64-bit integers: what to update. `fast` is null with beta1 = 0, `copy` where none is wanted. */
struct segment {
    void *parameter;      /* float or bfloat16, as are the next four */
    const void *gradient;
    void *fast, *slow, *square;
    u16 *copy; /* the new parameter, rounded to bfloat16 */
    i64 numel;
    i64 types;
    const struct element_range *ranges; /* for EMA states in bfloat16 */
    i64 num_ranges;
};

enum { GRADIENT_BF16 = 1, PARAMETER_BF16 = 2, FAST_BF16 = 4, SLOW_BF16 = 8, SQUARE_BF16 = 16 };

/* UpdateScalars in its order. A lerp's `far` says that its weight is .5 or more: then torch starts at the other end. */
struct scalars {
    float lr, weight_decay, eps, weight_fast, weight_slow, weight_sq, alpha, inverse_fast, inverse_sq;
    float step_low, step_high, grad_factor;
};

/* Where the random bits of a segment's elements come from: element i has those of `first + i` under the two keys. */
struct source {
    u32 first, key, other_key;
};

#define BLOCK 64     /* elements between two prefetches: four cache lines of floats */
#define AHEAD 512    /* elements that prefetching runs ahead */
#define LANES 64     /* sums of squares that grow side by side */
#define AHEAD_READING 1024 /* the same as AHEAD where nothing is written */
#define CHUNK 16384  /* elements that a thread takes at a time: a thread on a busy core takes fewer */

#define INLINE static inline __attribute__((always_inline))

INLINE float widen(u16 x) {
    union { u32 bits; float value; } u = {(u32)x << 16};
    return u.value;
}

INLINE u16 narrow(float x) { /* to nearest, ties to even; not a number stays one */
    union { float value; u32 bits; } u = {x};
    u32 rounded = (u.bits + 0x7fffu + ((u.bits >> 16) & 1u)) >> 16;
    return x == x ? (u16)rounded : (u16)0x7fc0u;
}

/* a * b + c, rounded once where the machine can, as torch's vector code does. */
INLINE float multiply_add(float a, float b, float c, const int fused) {
    return fused ? __builtin_fmaf(a, b, c) : a * b + c;
}

INLINE float lerp(float start, float end, float weight, const int fused) {
    int near = (weight < 0 ? -weight : weight) < 0.5f;
    return multiply_add(near ? weight : weight - 1.0f, end - start, near ? start : end, fused);
}

/* The update of elements `begin` to `end`. Pointers to what there is not are null. */
INLINE void elements(float *restrict p, u16 *restrict p_narrow, const float *restrict g, const u16 *restrict g_narrow,
                     float *restrict m1, float *restrict m2, float *restrict nu, u16 *restrict out, i64 begin,
                     i64 end, const struct scalars c, const int fused, const int g16, const int p16, const int copy,
                     const int fast) {
    const float minus_lr = -c.lr;
#pragma omp simd
    for (i64 i = begin; i < end; i++) {
        const float gradient = (g16 ? widen(g_narrow[i]) : g[i]) * c.grad_factor;
        const float parameter = p16 ? widen(p_narrow[i]) : p[i];
        float first = gradient;
        if (fast) m1[i] = first = lerp(m1[i], gradient, c.weight_fast, fused);
        const float second = m2[i] = lerp(m2[i], gradient, c.weight_slow, fused);
        const float square = nu[i] = lerp(nu[i], gradient * gradient, c.weight_sq, fused);
        const float denominator = __builtin_sqrtf(square) * c.inverse_sq + c.eps;
        float update = multiply_add(second, c.alpha, first * c.inverse_fast, fused);
        update = multiply_add(parameter, c.weight_decay, update / denominator, fused);
        const float result = multiply_add(update, minus_lr, parameter, fused);
        if (p16) p_narrow[i] = narrow(result); else p[i] = result;
        if (copy) out[i] = narrow(result);
    }
}

/* Past the end of a segment nothing is read: a prefetch of an unmapped address is dropped. */
INLINE void prefetch(const void *base, i64 line, const int is_narrow, const int is_written) {
    if (is_narrow && line & 16) return;
    const void *address = is_narrow ? (const void *)((const u16 *)base + line) : (const void *)((const float *)base + line);
    if (is_written) __builtin_prefetch(address, 1); else __builtin_prefetch(address, 0);
}

/* Floats from element `low` on: where they lie, or widened. */
INLINE float *widened(const void *base, i64 low, i64 n, const int is_narrow, float *restrict wide) {
    if (!is_narrow) return (float *)base + low;
    const u16 *restrict from = (const u16 *)base + low;
#pragma omp simd
    for (i64 i = 0; i < n; i++) wide[i] = widen(from[i]);
    return wide;
}

INLINE void narrowed(u16 *restrict to, const float *restrict wide, i64 n) {
#pragma omp simd
    for (i64 i = 0; i < n; i++) to[i] = narrow(wide[i]);
}

/* rounding.py's random_words. */
INLINE u32 random_word(u32 index, u32 key, u32 other_key) {
    u32 x = index + key;
    x = (x ^ x >> 16) * 0x85ebca6bu;
    x = ((x ^ x >> 13) + other_key) * 0xc2b2ae35u;
    return x ^ x >> 16;
}

/* To bfloat16, up in magnitude where 16 random bits carry over what is cut off. */
INLINE u16 narrow_randomly(float x, u32 bits) {
    union { float value; u32 bits; } u = {x};
    return x == x ? (u16)((u.bits + bits) >> 16) : (u16)0x7fc0u;
}

/* Round one EMA state with the low halves of the elements' words, another with the high ones; either may be absent. */
INLINE void rounded(u16 *restrict low, const float *restrict from_low, u16 *restrict high,
                    const float *restrict from_high, u32 first, u32 key, u32 other_key, i64 n) {
#pragma omp simd
    for (i64 i = 0; i < n; i++) {
        const u32 word = random_word(first + (u32)i, key, other_key);
        if (low) low[i] = narrow_randomly(from_low[i], word & 0xffffu);
        if (high) high[i] = narrow_randomly(from_high[i], word >> 16);
    }
}

INLINE void run(const struct segment *s, i64 low, i64 high, const struct scalars *k, const int fused, const int g16,
                const int p16, const int copy, const int fast) {
    const struct scalars c = *k;
    float *restrict p = (float *)s->parameter + (p16 ? 0 : low);
    u16 *restrict p_narrow = (u16 *)s->parameter + (p16 ? low : 0);
    const float *restrict g = (const float *)s->gradient + (g16 ? 0 : low);
    const u16 *restrict g_narrow = (const u16 *)s->gradient + (g16 ? low : 0);
    float *restrict m1 = fast ? (float *)s->fast + low : 0;
    float *restrict m2 = (float *)s->slow + low;
    float *restrict nu = (float *)s->square + low;
    u16 *restrict out = copy ? s->copy + low : 0;
    const i64 n = high - low;
    for (i64 begin = 0; begin < n; begin += BLOCK) {
        const i64 end = begin + BLOCK < n ? begin + BLOCK : n;
        for (i64 line = begin + AHEAD; line < begin + AHEAD + BLOCK; line += 16) {
            if (p16) prefetch(p_narrow, line, 1, 1); else prefetch(p, line, 0, 1);
            if (g16) prefetch(g_narrow, line, 1, 0); else prefetch(g, line, 0, 0);
            if (fast) prefetch(m1, line, 0, 1);
            prefetch(m2, line, 0, 1);
            prefetch(nu, line, 0, 1);
        }
        elements(p, p_narrow, g, g_narrow, m1, m2, nu, out, begin, end, c, fused, g16, p16, copy, fast);
    }
}

/* The same where EMA states are bfloat16: what is not float passes, a block at a time, through floats in the first-level
 * cache. A loop for every combination of types would be as fast, and 8 times as much code. */
INLINE void run_rounded(const struct segment *s, i64 low, i64 high, const struct scalars *k, struct source r,
                        const int fused, const int fast) {
    const struct scalars c = *k;
    const int g16 = (s->types & GRADIENT_BF16) != 0, p16 = (s->types & PARAMETER_BF16) != 0;
    const int fast16 = (s->types & FAST_BF16) != 0, slow16 = (s->types & SLOW_BF16) != 0;
    const int square16 = (s->types & SQUARE_BF16) != 0;
    float wide[5][BLOCK];
    for (i64 begin = low; begin < high; begin += BLOCK) {
        const i64 n = begin + BLOCK < high ? BLOCK : high - begin;
        for (i64 line = begin + AHEAD; line < begin + AHEAD + BLOCK; line += 16) {
            prefetch(s->parameter, line, p16, 1);
            prefetch(s->gradient, line, g16, 0);
            if (fast) prefetch(s->fast, line, fast16, 1);
            prefetch(s->slow, line, slow16, 1);
            prefetch(s->square, line, square16, 1);
        }
        float *p = widened(s->parameter, begin, n, p16, wide[0]);
        const float *g = widened(s->gradient, begin, n, g16, wide[1]);
        float *m1 = fast ? widened(s->fast, begin, n, fast16, wide[2]) : 0;
        float *m2 = widened(s->slow, begin, n, slow16, wide[3]), *nu = widened(s->square, begin, n, square16, wide[4]);
        elements(p, 0, g, 0, m1, m2, nu, 0, 0, n, c, fused, 0, 0, 0, fast);
        if (p16) narrowed((u16 *)s->parameter + begin, p, n);
        if (s->copy) narrowed(s->copy + begin, p, n);
        const u32 first = r.first + (u32)(begin - low);
        u16 *low_halves = fast && fast16 ? (u16 *)s->fast + begin : 0;
        u16 *high_halves = square16 ? (u16 *)s->square + begin : 0;
        if (low_halves && high_halves) rounded(low_halves, m1, high_halves, nu, first, r.key, r.other_key, n);
        else if (low_halves) rounded(low_halves, m1, 0, 0, first, r.key, r.other_key, n);
        else if (high_halves) rounded(0, 0, high_halves, nu, first, r.key, r.other_key, n);
        if (slow16) rounded((u16 *)s->slow + begin, m2, 0, 0, first, r.other_key, r.key, n);
    }
}

/* Every combination of types gets a loop of its own: inside there is no branch. */
INLINE void choose(const struct segment *s, i64 low, i64 high, const struct scalars *k, const int fused) {
#define CASE(g16, p16, copy, fast) \
    case (g16) | (p16) << 1 | (copy) << 2 | (fast) << 3: run(s, low, high, k, fused, g16, p16, copy, fast); break;
#define CASES(copy, fast) CASE(0, 0, copy, fast) CASE(1, 0, copy, fast) CASE(0, 1, copy, fast) CASE(1, 1, copy, fast)
    switch ((int)s->types | (s->copy != 0) << 2 | (s->fast != 0) << 3) {
        CASES(0, 0) CASES(1, 0) CASES(0, 1) CASES(1, 1)
    }
}

INLINE u32 mix(u32 x) {
    x = (x ^ x >> 16) * 0x85ebca6bu;
    x = (x ^ x >> 13) * 0xc2b2ae35u;
    return x ^ x >> 16;
}

/* A chunk of a segment: in one go, or for EMA states in bfloat16 range by range. */
INLINE void chunk(const struct segment *s, i64 low, i64 high, const struct scalars *k, const int fused) {
    if (!(s->types & (FAST_BF16 | SLOW_BF16 | SQUARE_BF16))) {
        choose(s, low, high, k, fused);
        return;
    }
    struct source r;
    const u32 step = mix((u32)k->step_low + ((u32)k->step_high << 16));
    i64 index = 0, past = s->num_ranges; /* the last range that begins at `low` or before, by bisection */
    while (past - index > 1) {
        const i64 middle = index + (past - index) / 2;
        if (s->ranges[middle].begin <= low) index = middle; else past = middle;
    }
    while (low < high) {
        const struct element_range *range = s->ranges + index++;
        const i64 next = index < s->num_ranges && range[1].begin < high ? range[1].begin : high;
        r.first = (u32)(range->start + low - range->begin);
        r.key = mix((u32)range->salt ^ step);
        r.other_key = mix((u32)range->other_salt ^ step);
        if (s->fast) run_rounded(s, low, next, k, r, fused, 1); else run_rounded(s, low, next, k, r, fused, 0);
        low = next;
    }
}

/* Add the squares of n <= LANES values, each to a sum of its own. */
INLINE void add_squares(double *restrict sums, const float *restrict values, const u16 *restrict narrow_values, i64 n,
                        const int is_narrow) {
#pragma omp simd
    for (i64 i = 0; i < n; i++) {
        const double x = is_narrow ? widen(narrow_values[i]) : values[i];
        sums[i] += x * x;
    }
}

/* The sum of the squares of a segment's gradient from `low` to `high`. The square of a float is exact in a double, and
 * the order of the sum is written down: every machine comes to the same bits, with fused multiply-adds or without. */
INLINE double squares(const struct segment *s, i64 low, i64 high, const int is_narrow) {
    const float *values = (const float *)s->gradient + (is_narrow ? 0 : low);
    const u16 *narrow_values = (const u16 *)s->gradient + (is_narrow ? low : 0);
    const i64 n = high - low;
    double sums[LANES] = {0}, sum = 0;
    i64 i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (i64 line = i + AHEAD_READING; line < i + AHEAD_READING + LANES; line += 16)
            if (is_narrow) prefetch(narrow_values, line, 1, 0); else prefetch(values, line, 0, 0);
        add_squares(sums, values + (is_narrow ? 0 : i), narrow_values + (is_narrow ? i : 0), LANES, is_narrow);
    }
    add_squares(sums, values + (is_narrow ? 0 : i), narrow_values + (is_narrow ? i : 0), n - i, is_narrow);
    for (int lane = 0; lane < LANES; lane++) sum += sums[lane];
    return sum;
}

INLINE double chunk_squares(const struct segment *s, i64 low, i64 high) {
    return s->types & GRADIENT_BF16 ? squares(s, low, high, 1) : squares(s, low, high, 0);
}

/* What the processor at hand runs fastest. */
struct kernels {
    void (*update)(const struct segment *, i64, i64, const struct scalars *);
    double (*squares)(const struct segment *, i64, i64);
};

#define KERNELS(name, target, fused) \
    target static void update_##name(const struct segment *s, i64 low, i64 high, const struct scalars *k) { \
        chunk(s, low, high, k, fused); \
    } \
    target static double squares_##name(const struct segment *s, i64 low, i64 high) { \
        return chunk_squares(s, low, high); \
    } \
    static const struct kernels name = {update_##name, squares_##name};

#if defined(__x86_64__)
/* x86-64-v4 and -v3 by their parts: not every compiler knows the names in __builtin_cpu_supports. */
#define AVX512 "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,bmi2,prefer-vector-width=512"
KERNELS(avx512, __attribute__((target(AVX512))), 1)
KERNELS(avx2, __attribute__((target("avx2,fma,bmi2"))), 1)
KERNELS(any, , 0)

static const struct kernels *best(void) {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma"))
        return &avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2;
    return &any;
}

INLINE u32 flush_denormals(void) {
    u32 before = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(before | 0x8040u);
    return before;
}
INLINE void restore(u32 before) { __builtin_ia32_ldmxcsr(before); }
#else
KERNELS(any, , 1)
static const struct kernels *best(void) { return &any; }
#if defined(__aarch64__)
INLINE u32 flush_denormals(void) {
    i64 before, flushing;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    flushing = before | (1 << 24);
    __asm__ volatile("msr fpcr, %0" : : "r"(flushing));
    return (u32)before;
}
INLINE void restore(u32 before) { __asm__ volatile("msr fpcr, %0" : : "r"((i64)before)); }
#else
INLINE u32 flush_denormals(void) { return 0; }
INLINE void restore(u32 before) { (void)before; }
#endif
#endif

/* Of the two structures above. A library left over from an older source must not be called with newer ones. */
int ademamix_version(void) { return 3; }

/* Hands out the chunks of all segments, in order: one parallel region for all, where a barrier for each tensor would
 * wait for the slowest thread each time. */
struct cursor {
    const struct segment *segment, *end;
    i64 first; /* the number of the segment's first chunk */
    i64 low, high;
};

/* Move to the next chunk that no other thread has; return its number, or -1. */
INLINE i64 take(struct cursor *c, i64 *next, const int is_shared) {
    const i64 mine = is_shared ? __atomic_fetch_add(next, 1, __ATOMIC_RELAXED) : (*next)++;
    for (; c->segment < c->end; c->segment++) {
        const i64 chunks = (c->segment->numel + CHUNK - 1) / CHUNK;
        if (mine < c->first + chunks) {
            c->low = (mine - c->first) * CHUNK;
            c->high = c->low + CHUNK < c->segment->numel ? c->low + CHUNK : c->segment->numel;
            return mine;
        }
        c->first += chunks;
    }
    return -1;
}

/* Update all segments. `grad_factor`, where it is not null, stands in for the one in `scalars`: a clipping factor is
 * taken from where it was computed. */
void ademamix_step(const struct segment *segments, i64 num_segments, const struct scalars *given,
                   const float *grad_factor, int num_threads) {
    struct scalars k = *given;
    const struct kernels *kernels = best();
    i64 next = 0;
    if (grad_factor) k.grad_factor = *grad_factor;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
        /* The mode belongs to a thread: set outside of the region it would hold for one of them. */
        const u32 before = flush_denormals();
        struct cursor c = {segments, segments + num_segments, 0, 0, 0};
        while (take(&c, &next, num_threads > 1) >= 0) kernels->update(c.segment, c.low, c.high, &k);
        restore(before);
    }
}

/* For each segment the sum of the squares of its gradient; only `gradient`, `numel` and `types` are looked at. `partial`
 * has room for a number for each chunk, which are added up in order: the sums do not depend on the threads. */
void ademamix_squares(const struct segment *segments, i64 num_segments, double *partial, double *sums,
                      int num_threads) {
    const struct kernels *kernels = best();
    i64 next = 0;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
        struct cursor c = {segments, segments + num_segments, 0, 0, 0};
        i64 mine;
        while ((mine = take(&c, &next, num_threads > 1)) >= 0)
            partial[mine] = kernels->squares(c.segment, c.low, c.high);
    }
    for (i64 i = 0; i < num_segments; i++) {
        sums[i] = 0;
        for (i64 low = 0; low < segments[i].numel; low += CHUNK) sums[i] += *partial++;
    }
}
