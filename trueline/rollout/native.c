/* One new token for each of a few requests, in float32 on a CPU. One rule: what a request's numbers are never depends on its neighbours.

   Called by native.py, which says what everything is. A step reads every weight once and does little with it, so it takes as long as memory
   gives the weights: products fetch the next rows of a weight while they multiply these. All tensors are contiguous; sizes of what is
   summed over are multiples of 16. */

#include <math.h>
#include <omp.h>
#include <stdint.h>

#if defined(LANES) /* by a test: vectors that this CPU has no registers for */
#define KEEP(v)
#else
#define KEEP(v) __asm__("" : "+v"(v)) /* loaded once; compilers else load it again for each product */
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#endif
#define UNROLL _Pragma("GCC unroll 16")
#define INLINED static inline __attribute__((always_inline))
#define TILE 3     /* rows of a weight, times 4 states: 12 sums, 3 weights and a state fill the 16 registers of AVX2 */
#define PORTION 48 /* rows of a weight that a thread takes at a time */
#define STEP 64    /* columns of keys and values at a time: their values stay in the nearest cache */

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4)));

static inline vec load(const float *from) { return *(const vec *)from; }
static inline void store(float *to, vec v) { *(vec *)to = v; }

/* The first `count` numbers, and zeros; nothing but zeros without a place. */
static inline vec load_some(const float *from, long count)
{
    float some[LANES] = {0};
    if (from && count >= LANES) return load(from);
    for (long i = 0; from && i < count; i++) some[i] = from[i];
    return load(some);
}

static inline void store_some(float *to, vec v, long count)
{
    float some[LANES];
    if (count >= LANES) {
        store(to, v);
        return;
    }
    store(some, v);
    for (long i = 0; i < count; i++) to[i] = some[i];
}

static inline float sum(vec v)
{
    float s[LANES];
    store(s, v);
    UNROLL for (int width = LANES / 2; width; width /= 2)
        UNROLL for (int i = 0; i < width; i++) s[i] += s[i + width];
    return s[0];
}

static inline vec choose(ivec mask, vec a, vec b) { return (vec)(((ivec)a & mask) | ((ivec)b & ~mask)); }

/* e^x by x = n ln 2 + r and a polynomial of r (Cephes' expf): within 2 units of the last place; below -87 it stays at 1e-38. */
static inline vec exponential(vec x)
{
    const vec low = (vec){0} - 87.0f, high = (vec){0} + 88.0f, magic = (vec){0} + 12582912.0f;
    x = choose(x < low, low, choose(x > high, high, x));
    vec n = x * 1.44269504f + magic; /* rounds: its last bits are n */
    ivec power = ((ivec)n - (ivec)magic + 127) << 23;
    n -= magic;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1.0f) * (vec)power;
}

static inline vec activated(vec x, long then)
{
    if (then == 1) return x / (1.0f + exponential(-x));
    if (then == 2) return x / (1.0f + exponential(x * (-1.5957691216f - 0.0713548163f * x * x))); /* GELU by tanh */
    return x;
}

/* y[c][r] = w[r] . x[c]. Meanwhile what lies at `next` is fetched, `pace` numbers for each vector of x. */
#define PRODUCT(R, C)                                                                                                  \
    static void product##R##C(const float *w, const float *x, long in, float *y, long out, const float *next,        \
                              long pace)                                                                               \
    {                                                                                                                  \
        vec s[R][C];                                                                                                   \
        UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) s[r][c] = (vec){0};                      \
        for (long i = 0; i < in; i += LANES) {                                                                         \
            vec a[R];                                                                                                  \
            UNROLL for (int r = 0; r < R; r++) a[r] = load(w + r * in + i);                                            \
            for (long ahead = 0; ahead < pace; ahead += 16) __builtin_prefetch(next + ahead);                          \
            next += pace;                                                                                              \
            UNROLL for (int c = 0; c < C; c++) {                                                                       \
                vec b = load(x + c * in + i);                                                                          \
                KEEP(b);                                                                                               \
                UNROLL for (int r = 0; r < R; r++) s[r][c] += a[r] * b;                                                \
            }                                                                                                          \
        }                                                                                                              \
        UNROLL for (int c = 0; c < C; c++) UNROLL for (int r = 0; r < R; r++) y[c * out + r] = sum(s[r][c]);           \
    }
PRODUCT(3, 4) PRODUCT(3, 3) PRODUCT(3, 2) PRODUCT(3, 1) PRODUCT(1, 4) PRODUCT(1, 3) PRODUCT(1, 2) PRODUCT(1, 1)

typedef void product(const float *, const float *, long, float *, long, const float *, long);

/* y [rows, out] = then(x [rows, in] w' [in, out] + bias), then plus (how 1) or times (how 2) other [rows, out]. */
void linear(const float *x, const float *w, const float *bias, const float *other, float *y, long rows, long in, long out, long then,
            long how, long threads)
{
    static product *const three[] = {product34, product31, product32, product33};
    static product *const one[] = {product14, product11, product12, product13};
    long parts = rows > 4 ? (rows + 3) / 4 : 1;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (long first = 0; first < out; first += PORTION) {
        long end = first + PORTION < out ? first + PORTION : out;
        for (long o = first; o < end;) {
            long height = end - o < TILE ? 1 : TILE;
            /* the next rows, a part with each four states: fetched at once they would be waited for */
            long pace = o + 2 * height <= out ? (height * LANES + parts - 1) / parts : 0;
            const float *next = w + (o + height) * in;
            for (long c = 0; c < rows; c += 4, next += pace * (in / LANES)) {
                long width = rows - c < 4 ? rows - c : 0;
                (height == 1 ? one : three)[width](w + o * in, x + c * in, in, y + c * out + o, out, next, pace);
            }
            o += height;
        }
        if (!bias && !then && !how) continue;
        for (long c = 0; c < rows; c++)
            for (long o = first; o < end; o += LANES) {
                float *at = y + c * out + o;
                vec v = activated(load_some(at, end - o) + load_some(bias ? bias + o : 0, end - o), then);
                vec beside = load_some(how ? other + c * out + o : 0, end - o);
                store_some(at, how == 1 ? v + beside : how == 2 ? v * beside : v, end - o);
            }
    }
}

/* y = x / sqrt(mean(x^2) + eps) * weight, row by row. */
void rms_norm(const float *x, const float *weight, float *y, long rows, long size, float eps, long threads)
{
#pragma omp parallel for if (rows > 64) num_threads(threads)
    for (long c = 0; c < rows; c++) {
        const float *from = x + c * size;
        float *to = y + c * size;
        vec s = {0};
        for (long i = 0; i < size; i += LANES) s += load(from + i) * load(from + i);
        float scale = 1.0f / sqrtf(sum(s) / size + eps);
        for (long i = 0; i < size; i += LANES) store(to + i, load(from + i) * scale * load(weight + i));
    }
}

/* What a request has stored: token t of head `group` lies at `keys + token(t)`. */
struct past {
    const int32_t *pages; /* of this request; none: row `request` */
    long request, groups, group, length, size;
};

static inline long token(const struct past *p, long t)
{
    long row = p->pages ? p->pages[t / p->length] : p->request, column = p->pages ? t % p->length : t;
    return ((row * p->groups + p->group) * p->length + column) * p->size;
}

/* weights[s][t] = q[s] . key t, for t in [from, to); `count`, at most 4, is a constant where this is called. */
INLINED void scores(const int count, const float *q, const float *keys, const struct past *p, long from, long to, float *weights, long most,
                    float scale)
{
    for (long t = from; t < to; t++) {
        const float *key = keys + token(p, t);
        vec v[4] = {{0}};
        for (long i = 0; i < p->size; i += LANES)
            UNROLL for (int s = 0; s < count; s++) v[s] += load(key + i) * load(q + s * p->size + i);
        UNROLL for (int s = 0; s < count; s++) weights[s * most + t - from] = scale * sum(v[s]);
    }
}

/* out[s] += sum over t of weights[s][t] value t. */
INLINED void mix(const int count, const float *weights, long most, const float *values, const struct past *p, long from, long to,
                 float *out)
{
    for (long start = from; start < to; start += STEP) {
        long end = start + STEP < to ? start + STEP : to;
        for (long i = 0; i < p->size; i += 16) {
            vec v[4][16 / LANES];
            UNROLL for (int s = 0; s < count; s++)
                UNROLL for (int k = 0; k < 16 / LANES; k++) v[s][k] = load(out + s * p->size + i + k * LANES);
            for (long t = start; t < end; t++) {
                const float *value = values + token(p, t) + i;
                UNROLL for (int k = 0; k < 16 / LANES; k++)
                    UNROLL for (int s = 0; s < count; s++) v[s][k] += weights[s * most + t - from] * load(value + k * LANES);
            }
            UNROLL for (int s = 0; s < count; s++)
                UNROLL for (int k = 0; k < 16 / LANES; k++) store(out + s * p->size + i + k * LANES, v[s][k]);
        }
    }
}

/* Weights that sum to 1; what has none stands between `count` and the next multiple of LANES, for which there is room. */
static void softmax(float *w, long count)
{
    float top = w[0];
    for (long t = 1; t < count; t++) top = w[t] > top ? w[t] : top;
    for (long t = count; t % LANES; t++) w[t] = -INFINITY;
    vec v = {0};
    for (long t = 0; t < count; t += LANES) {
        store(w + t, exponential(load(w + t) - top));
        v += load(w + t);
    }
    float total = sum(v);
    for (long t = 0; t < count; t += LANES) store(w + t, load(w + t) / total);
}

/* FUNCTION of the next 4 queries, or of as many as are left. */
#define OF(FUNCTION, LEFT, ...)                                                                                        \
    switch (LEFT) {                                                                                                    \
    case 1: FUNCTION(1, __VA_ARGS__); break;                                                                           \
    case 2: FUNCTION(2, __VA_ARGS__); break;                                                                           \
    case 3: FUNCTION(3, __VA_ARGS__); break;                                                                           \
    default: FUNCTION(4, __VA_ARGS__);                                                                                 \
    }

/* Turns q and k of heads [n, groups, share + 2, size], stores k and v as token `index` of each request, and attends to all up to it.
   turn [n, pairs, 2]: cosine and sine of each pair of channels. keys, values: [rows, groups, length, size], or with pages [n, many]
   [pages, groups, length, size]. out [n, groups, share, size]; scratch [threads, share, most], `most` a multiple of 16. window: 0 sees
   everything. */
void attend(float *heads, const float *turn, float *keys, float *values, const int32_t *pages, const int64_t *index, float *out,
            float *scratch, long n, long groups, long share, long size, long pairs, long length, long many, long most, long window,
            long threads)
{
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (long job = 0; job < n * groups; job++) {
        long request = job / groups, to = index[request] + 1, from = window && window < to ? to - window : 0;
        struct past p = {pages ? pages + request * many : 0, request, groups, job % groups, length, size};
        float *q = heads + job * (share + 2) * size, *seen = out + job * share * size;
        float *weights = scratch + omp_get_thread_num() * share * most;
        for (long s = 0; s <= share; s++)
            for (long i = 0; i < pairs; i++) {
                const float *by = turn + 2 * (request * pairs + i), cosine = by[0], sine = by[1];
                float *x = q + s * size + 2 * i, first = x[0];
                x[0] = first * cosine - x[1] * sine;
                x[1] = first * sine + x[1] * cosine;
            }
        long newest = token(&p, to - 1);
        for (long i = 0; i < size; i++) keys[newest + i] = q[share * size + i], values[newest + i] = q[(share + 1) * size + i];

        for (long i = 0; i < share * size; i += LANES) store(seen + i, (vec){0});
        for (long s = 0; s < share; s += 4) {
            OF(scores, share - s, q + s * size, keys, &p, from, to, weights + s * most, most, 1.0f / sqrtf(size))
            for (long i = s; i < share && i < s + 4; i++) softmax(weights + i * most, to - from);
            OF(mix, share - s, weights + s * most, most, values, &p, from, to, seen + s * size)
        }
    }
}
