/* The yardstick of optimizer_step.py: memory traffic of an optimizer's step and nothing else. `num_written` arrays are
 * read and written, one more is read: 4 bytes times 2 * num_written + 1 for each element. */

typedef long long i64;

#define STREAM(name, sums) \
    static void name(float *restrict a, float *restrict b, float *restrict c, float *restrict d, \
                     const float *restrict g, i64 n) { \
        _Pragma("omp simd") for (i64 i = 0; i < n; i++) { sums } \
    }

STREAM(four, a[i] += g[i]; b[i] += g[i]; c[i] += g[i]; d[i] += g[i];)
STREAM(three, a[i] += g[i]; b[i] += g[i]; c[i] += g[i]; (void)d;)

void stream(float *a, float *b, float *c, float *d, const float *g, i64 n, int num_written, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
    for (int part = 0; part < num_threads; part++) {
        const i64 low = n * part / num_threads, size = n * (part + 1) / num_threads - low;
        (num_written == 4 ? four : three)(a + low, b + low, c + low, d + low, g + low, size);
    }
}
