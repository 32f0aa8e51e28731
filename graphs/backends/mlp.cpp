// The two products of a transformer's MLP in one, in bfloat16, for processors with AMX:
//
//     second · activation(first · x + bias) + bias + other        x may be normed on its way, the result too
//
// A few rows go through both while what is between them stays in the second cache: it is up to four times as wide as
// they are, and written to memory and read again it takes as long as the products do. 32 x 32 numbers at a time are
// summed up in four tiles; while the next are, the activation of those before is taken, by the units that the tiles
// leave idle. Sums, activations and what is added are float32. A row's bits depend on its own numbers alone.
//
// Weights lie as tiles for 32 columns at a time: [columns / 32][depth / 32][2][16 pairs of the depth][16 columns][2].

#include "tiles.h"

extern "C" void layer_norm(const bf16 *x, bf16 *to, const float *weight, const float *bias, const int64_t *order,
                           long batch, long rows, long count, long width, float eps, long threads);

namespace {

enum Activation { NONE, RELU, GELU, TANH, QUICK };  // GELU by erf, with tanh, and as x · sigmoid(1.702 x)

const long SPACE = 1 << 20;  // bytes of what is between the products, of one thread
const long MOST_ROWS = 256;
const long STREAMED = 1 << 20;  // bytes of a result that will not be found in a cache anyway

// Within 1e-5 of GELU: x (1/2 + x p(x²)) up to ±END, beyond which it is x, or 0 where it is above -2e-5. Coefficients of
// p by powers of t = 2 x² / END² - 1, least largest error of x² p.
const float END = 4.5f;
const float BY_ERF[] = {1.569053007e-01f,  -7.718336986e-02f, 5.467185202e-02f,  -4.029579006e-02f, 2.862395988e-02f,
                        -1.815920992e-02f, 1.014047748e-02f,  -6.682867224e-03f, 4.655309460e-03f,  -1.565655093e-03f};
const float BY_TANH[] = {1.569387082e-01f,  -7.728445167e-02f, 5.476029694e-02f,  -4.024871123e-02f, 2.838155945e-02f,
                         -1.755290053e-02f, 9.444590367e-03f,  -6.837395182e-03f, 5.464047702e-03f,  -1.955350929e-03f};

template <Activation A> inline __m512 activated(__m512 x) {
    if (A == NONE) return x;
    if (A == RELU) return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NLE_UQ), x);  // NaN stays
    if (A == QUICK) {
        const __m512 power = exp2(_mm512_mul_ps(x, _mm512_set1_ps(-1.702f * LOG2E)));
        return _mm512_div_ps(x, _mm512_add_ps(power, _mm512_set1_ps(1.0f)));
    }
    const float *by = A == GELU ? BY_ERF : BY_TANH;
    const __m512 near = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(END)), _mm512_set1_ps(-END));
    const __m512 t = _mm512_fmsub_ps(_mm512_mul_ps(near, near), _mm512_set1_ps(2 / END / END), _mm512_set1_ps(1.0f));
    __m512 p = _mm512_set1_ps(by[9]);
#pragma GCC unroll 9
    for (int i = 8; i >= 0; i--) p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(by[i]));
    const __m512 share = _mm512_fmadd_ps(near, p, _mm512_set1_ps(0.5f));
    return _mm512_maskz_mul_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-END), _CMP_NLE_UQ), x, share);
}

struct Product {
    const bf16 *weight;
    const float *bias;
    long depth, columns;  // multiples of 32
};

struct Columns {  // some of a product's, multiples of 32
    long begin, end;
};

struct Block {  // 32 columns of up to 32 rows that have been summed up
    const float *sums;
    const bf16 *other;
    const float *bias;
    bf16 *to;
    long rows;
};

template <Activation A, bool STREAM> inline void finish(const Block &block, long row, long step) {
    __m512 x[2];
    for (int half = 0; half < 2; half++) {
        const __m512 sum = _mm512_load_ps(block.sums + row * 32 + half * 16);
        x[half] = activated<A>(_mm512_add_ps(sum, _mm512_loadu_ps(block.bias + half * 16)));
        if (A == NONE && block.other) {
            const bf16 *const other = block.other + row * step + half * 16;
            x[half] = _mm512_add_ps(x[half], widened(_mm256_loadu_si256((const __m256i *)other)));
        }
    }
    void *const to = block.to + row * step;
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]);
    if (STREAM)
        _mm512_stream_si512((__m512i *)to, both);
    else
        _mm512_storeu_si512(to, both);
}

// x, other and to: `rows` rows, dense. sums: twice 32 x 32; spare: 32 rows of x.
template <Activation A, bool STREAM>
void product(const Product &by, Columns some, const bf16 *x, const bf16 *other, bf16 *to, long rows, float *sums,
             bf16 *spare) {
    const long chunks = by.depth / 32, whole = rows / 32 * 32;
    if (whole < rows) {
        memcpy(spare, x + whole * by.depth, (rows - whole) * by.depth * 2);
        memset(spare + (rows - whole) * by.depth, 0, (32 - rows + whole) * by.depth * 2);
    }
    Block last = {};
    const long lines = (1024 + rows - 1) / rows;  // of the next columns' weights, asked for in each step
    for (long c = some.begin; c < some.end; c += 32) {
        const bf16 *const weight = by.weight + c * by.depth;
        const char *next = (const char *)(weight + 32 * by.depth);
        const char *const ends = c + 32 < some.end ? next + 64 * by.depth : next;
        for (long r = 0; r < rows; r += 32) {
            const bf16 *const a = r < whole ? x + r * by.depth : spare;
            float *const here = last.sums == sums ? sums + 1024 : sums;
            long done = 0;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (long k = 0; k < chunks; k++) {
                _tile_loadd(4, a + k * 32, by.depth * 2);
                _tile_loadd(6, weight + k * 1024, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, weight + k * 1024 + 512, 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, a + 16 * by.depth + k * 32, by.depth * 2);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
                for (long line = 0; line < lines && next < ends; line++, next += 64) _mm_prefetch(next, _MM_HINT_T1);
                for (const long until = (k + 1) * last.rows / chunks; done < until; done++)
                    finish<A, STREAM>(last, done, by.columns);
            }
            _tile_stored(0, here, 128);
            _tile_stored(1, here + 16, 128);
            _tile_stored(2, here + 512, 128);
            _tile_stored(3, here + 528, 128);
            const long at = r * by.columns + c;
            last = {here, other ? other + at : nullptr, by.bias + c, to + at, rows - r < 32 ? rows - r : 32};
        }
    }
    for (long row = 0; row < last.rows; row++) finish<A, STREAM>(last, row, by.columns);
}

typedef void (*Multiply)(const Product &, Columns, const bf16 *, const bf16 *, bf16 *, long, float *, bf16 *);

Multiply chosen(Activation activation) {
    switch (activation) {
    case RELU: return product<RELU, false>;
    case GELU: return product<GELU, false>;
    case TANH: return product<TANH, false>;
    case QUICK: return product<QUICK, false>;
    default: return product<NONE, false>;
    }
}

}  // namespace

// What is the same in every call of one place in a graph.
struct Mlp {
    const bf16 *first, *second;
    const float *first_bias, *second_bias;
    const float *norm_weight, *norm_bias;  // null, or of a layer norm of x
    const float *then_weight, *then_bias;  // null, or of a layer norm of the result
    long width, between, columns, activation;
    long residual;  // not 0: what x is normed to is added to the result, as `other` is
    float norm_eps, then_eps;
};

// x: [rows, width], other (or null) and to: [rows, columns], all dense. Not 0: no memory.
extern "C" int mlp(const Mlp *of, const bf16 *x, const bf16 *other, bf16 *to, long rows, long threads) {
    if (!rows) return 0;  // the loops below step by a share of them
    const long width = of->width, between = of->between, columns = of->columns;
    const Product first = {of->first, of->first_bias, width, between};
    const Product second = {of->second, of->second_bias, between, columns};
    const Multiply begin = chosen((Activation)of->activation);
    const bool read_again = of->then_weight || rows * columns * 2 < STREAMED;
    const Multiply end = read_again ? product<NONE, false> : product<NONE, true>;

    long each = SPACE / (between * 2) / 32 * 32;
    each = each < 32 ? 32 : each > MOST_ROWS ? MOST_ROWS : each;
    // too few to give each thread its own: all read all weights then, where a share of the columns needs a share of them
    const bool together = threads > 1 && rows < threads * MOST_ROWS / 2;

    const long between_bytes = each * between * 2, normed_bytes = of->norm_weight ? each * width * 2 : 0;
    const long spare_bytes = 64 * (width > between ? width : between), sum_bytes = 2 * 32 * 32 * 4;
    const long bytes = between_bytes + normed_bytes + spare_bytes + sum_bytes;
    char *const space = (char *)aligned_alloc(64, bytes * threads);
    if (!space) return 1;

#pragma omp parallel num_threads(threads)
    {
        const long thread = omp_get_thread_num(), count = omp_get_num_threads();
        char *at = space + bytes * thread;
        const auto take = [&at](long size) { return (void *)((at += size) - size); };
        float *const sums = (float *)take(sum_bytes);
        bf16 *const kept = (bf16 *)take(between_bytes), *const spare = (bf16 *)take(spare_bytes);
        bf16 *const normed = (bf16 *)take(normed_bytes);
        const Tiles tiles;
        const auto rows_at = [&](long r) { return rows - r < each ? rows - r : each; };
        const auto norm = [&](const bf16 *from, bf16 *to, const float *weight, const float *bias, long some, long width,
                              float eps) { layer_norm(from, to, weight, bias, nullptr, 1, some, some, width, eps, 1); };
        const auto input = [&](long r) {
            const bf16 *const from = x + r * width;
            if (!of->norm_weight) return from;
            norm(from, normed, of->norm_weight, of->norm_bias, rows_at(r), width, of->norm_eps);
            return (const bf16 *)normed;
        };
        const auto norm_result = [&](long r, long until) {
            bf16 *const its = to + r * columns;
            if (of->then_weight) norm(its, its, of->then_weight, of->then_bias, until - r, columns, of->then_eps);
        };
        const auto both = [&](long r, bf16 *kept, Columns of_first, Columns of_second) {
            const bf16 *const from = input(r), *const added = of->residual ? from : other ? other + r * columns : nullptr;
            begin(first, of_first, from, nullptr, kept, rows_at(r), sums, spare);
            if (together) {
#pragma omp barrier
            }
            end(second, of_second, kept, added, to + r * columns, rows_at(r), sums, spare);
        };
        if (together) {
            const auto share = [&](long of) {
                return Columns{of / 32 * thread / count * 32, of / 32 * (thread + 1) / count * 32};
            };
            for (long r = 0; r < rows; r += each) {
                both(r, (bf16 *)(space + sum_bytes), share(between), share(columns));
#pragma omp barrier
                norm_result(r + rows_at(r) * thread / count, r + rows_at(r) * (thread + 1) / count);
            }
        } else {
#pragma omp for schedule(dynamic)
            for (long r = 0; r < rows; r += each) {
                both(r, kept, {0, between}, {0, columns});
                norm_result(r, r + rows_at(r));
            }
        }
        _mm_sfence();  // what was streamed is there before another thread goes on
    }
    free(space);
    return 0;
}
