/* One AdEMAMix update over a list of segments, in one read and one write of memory.
 *
 * The arithmetic is ademamix_update's (update.py), operation for operation: each line rounds where that one does,
 * fused multiply-adds included. native.py says what differs. No header is needed, neither Python's nor torch's. */

typedef long long i64;
typedef unsigned int u32;
typedef unsigned short u16;

/* One row of eight 64-bit integers: what to update. `fast` is null with beta1 = 0, `copy` where none is wanted. */
struct segment {
    void *parameter;      /* float or bfloat16 */
    const void *gradient; /* float or bfloat16 */
    float *fast, *slow, *square;
    u16 *copy; /* the new parameter, rounded to bfloat16 */
    i64 numel;
    i64 types;
};

enum { GRADIENT_BF16 = 1, PARAMETER_BF16 = 2 };

/* UpdateScalars in its order. A lerp's `far` says that its weight is .5 or more: then torch starts at the other end. */
struct scalars {
    float lr, weight_decay, eps, weight_fast, weight_slow, weight_sq, alpha, inverse_fast, inverse_sq, grad_factor;
};

#define NUM_STREAMS 5
#define BLOCK 64     /* elements between two prefetches: four cache lines of floats */
#define AHEAD 512    /* elements that prefetching runs ahead */
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

INLINE void run(const struct segment *s, i64 low, i64 high, const struct scalars *k, const int fused, const int g16,
                const int p16, const int copy, const int fast) {
    const struct scalars c = *k;
    const float minus_lr = -c.lr;
    float *restrict p = (float *)s->parameter + (p16 ? 0 : low);
    u16 *restrict p_narrow = (u16 *)s->parameter + (p16 ? low : 0);
    const float *restrict g = (const float *)s->gradient + (g16 ? 0 : low);
    const u16 *restrict g_narrow = (const u16 *)s->gradient + (g16 ? low : 0);
    float *restrict m1 = fast ? s->fast + low : 0;
    float *restrict m2 = s->slow + low;
    float *restrict nu = s->square + low;
    u16 *restrict out = copy ? s->copy + low : 0;
    const i64 n = high - low;
    for (i64 begin = 0; begin < n; begin += BLOCK) {
        const i64 end = begin + BLOCK < n ? begin + BLOCK : n;
        /* Past the end of a segment nothing is read: a prefetch of an unmapped address is dropped. */
        for (i64 line = begin + AHEAD; line < begin + AHEAD + BLOCK; line += 16) {
            if (p16) { if (!(line & 16)) __builtin_prefetch(p_narrow + line, 1); } else __builtin_prefetch(p + line, 1);
            if (g16) { if (!(line & 16)) __builtin_prefetch(g_narrow + line, 0); } else __builtin_prefetch(g + line, 0);
            if (fast) __builtin_prefetch(m1 + line, 1);
            __builtin_prefetch(m2 + line, 1);
            __builtin_prefetch(nu + line, 1);
        }
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

typedef void kernel(const struct segment *, i64, i64, const struct scalars *);

#if defined(__x86_64__)
/* x86-64-v4 and -v3 by their parts: not every compiler knows the names in __builtin_cpu_supports. */
__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,bmi2,prefer-vector-width=512")))
static void run_avx512(const struct segment *s, i64 low, i64 high, const struct scalars *k) { choose(s, low, high, k, 1); }
__attribute__((target("avx2,fma,bmi2")))
static void run_avx2(const struct segment *s, i64 low, i64 high, const struct scalars *k) { choose(s, low, high, k, 1); }
static void run_any(const struct segment *s, i64 low, i64 high, const struct scalars *k) { choose(s, low, high, k, 0); }

static kernel *best(void) {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma"))
        return run_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return run_avx2;
    return run_any;
}

INLINE u32 flush_denormals(void) {
    u32 before = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(before | 0x8040u);
    return before;
}
INLINE void restore(u32 before) { __builtin_ia32_ldmxcsr(before); }
#else
static void run_any(const struct segment *s, i64 low, i64 high, const struct scalars *k) { choose(s, low, high, k, 1); }
static kernel *best(void) { return run_any; }
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
int ademamix_version(void) { return 1; }

/* Update all segments. `grad_factor`, where it is not null, stands in for the one in `scalars`: a clipping factor is
 * taken from where it was computed. Chunks of all segments are handed out in one parallel region: a barrier for each
 * tensor would wait for the slowest thread each time. */
void ademamix_step(const struct segment *segments, i64 num_segments, const struct scalars *given,
                   const float *grad_factor, int num_threads) {
    struct scalars k = *given;
    kernel *update = best();
    i64 next = 0;
    if (grad_factor) k.grad_factor = *grad_factor;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
        /* The mode belongs to a thread: set outside of the region it would hold for one of them. */
        u32 before = flush_denormals();
        i64 index = 0, first = 0; /* the segment at hand and the number of its first chunk */
        i64 mine = num_threads > 1 ? __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED) : next++;
        while (index < num_segments) {
            const struct segment *s = segments + index;
            const i64 chunks = (s->numel + CHUNK - 1) / CHUNK;
            if (mine >= first + chunks) {
                first += chunks;
                index++;
                continue;
            }
            const i64 low = (mine - first) * CHUNK, high = low + CHUNK < s->numel ? low + CHUNK : s->numel;
            update(s, low, high, &k);
            mine = num_threads > 1 ? __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED) : next++;
        }
        restore(before);
    }
}
