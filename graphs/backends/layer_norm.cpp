// Layer norms of bfloat16 rows, for processors with AVX-512: (x - mean) / sqrt(variance + eps) · weight + bias.
//
// A row is widened once, and stays in registers or in the first cache; mean, then variance about it, in float32. Rows
// can be put in another order on their way. A row's bits depend on its own numbers alone.

#include "tiles.h"

namespace {

const long MOST_WIDTH = 4096;

struct Factors {
    const float *weight, *bias;  // of ones and zeros where a norm has none
    long width;
    float eps;
};

// N: vectors of 16 numbers, held in registers; 0: as many as the width has, the last with lanes that are left out.
template <int N> inline void norm(const bf16 *x, bf16 *to, const Factors &by, float *row) {
    const long count = N ? N : (by.width + 15) / 16;
    const uint16_t rest = by.width % 16 ? (uint16_t)((1u << by.width % 16) - 1) : 0xffff;
    const auto lanes = [=](long i) { return N || i + 1 < count ? (uint16_t)0xffff : rest; };
    __m512 held[N ? N : 1], sum = _mm512_setzero_ps();
#pragma GCC unroll 24
    for (long i = 0; i < count; i++) {
        const __m512 part = widened(_mm256_maskz_loadu_epi16(lanes(i), x + i * 16));
        if (N)
            held[N ? i : 0] = part;
        else
            _mm512_store_ps(row + i * 16, part);
        sum = _mm512_add_ps(sum, part);
    }
    const auto read = [&](long i) { return N ? held[N ? i : 0] : _mm512_load_ps(row + i * 16); };
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / by.width);
    __m512 squares = _mm512_setzero_ps();
#pragma GCC unroll 24
    for (long i = 0; i < count; i++) {
        const __m512 off = _mm512_maskz_sub_ps(lanes(i), read(i), mean);
        squares = _mm512_fmadd_ps(off, off, squares);
    }
    const float variance = _mm512_reduce_add_ps(squares) / by.width;
    const __m512 scale = _mm512_set1_ps(1.0f / __builtin_sqrtf(variance + by.eps));
#pragma GCC unroll 24
    for (long i = 0; i < count; i++) {
        const __m512 y = _mm512_mul_ps(_mm512_sub_ps(read(i), mean), scale);
        const __m512 weight = _mm512_maskz_loadu_ps(lanes(i), by.weight + i * 16);
        const __m512 bias = _mm512_maskz_loadu_ps(lanes(i), by.bias + i * 16);
        _mm256_mask_storeu_epi16(to + i * 16, lanes(i), (__m256i)_mm512_cvtneps_pbh(_mm512_fmadd_ps(y, weight, bias)));
    }
}

typedef void (*Norm)(const bf16 *, bf16 *, const Factors &, float *);

Norm chosen(long width) {
    switch (width) {
    case 96: return norm<6>;
    case 192: return norm<12>;
    case 384: return norm<24>;
    default: return norm<0>;
    }
}

}  // namespace

// x: [batch, rows, width], to: [batch, count, width], both dense. order: which of a sample's rows stands where, `count`
// of them; null: all, as they are. weight, bias: [width].
extern "C" void layer_norm(const bf16 *x, bf16 *to, const float *weight, const float *bias, const int64_t *order,
                           long batch, long rows, long count, long width, float eps, long threads) {
    const Norm one = chosen(width);
    const Factors by = {weight, bias, width, eps};
#pragma omp parallel num_threads(threads)
    {
        alignas(64) float row[MOST_WIDTH];
#pragma omp for collapse(2) schedule(static)
        for (long b = 0; b < batch; b++)
            for (long n = 0; n < count; n++)
                one(x + (b * rows + (order ? order[n] : n)) * width, to + (b * count + n) * width, by, row);
    }
}
