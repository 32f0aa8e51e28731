// Pillow's resizing of pictures, to the bit, with vectors: one pass across or down, of the part that is looked at.
//
// Each pixel of the result is a sum of a few of the picture's, whose factors are integers: so the order in which a
// pass adds is free, and only where it rounds, after each pass, is not. Pixels are four bytes, of which three count.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

const int BITS = 22;                   // of a factor, behind the point
const int32_t HALF = 1 << (BITS - 1);  // rounds

enum Filter { BILINEAR = 2, BICUBIC = 3 };  // as Pillow numbers them

double weight(int filter, double x) {
    if (x < 0) x = -x;
    if (filter == BILINEAR) return x < 1 ? 1 - x : 0;
    const double a = -0.5;
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

struct Taps {  // of one pixel of the result
    long first, count;
    std::vector<int32_t> factors;
};

Taps taps(int filter, long in, long out, long at) {
    const double scale = (double)in / out, widened = scale < 1 ? 1 : scale;
    const double support = (filter == BILINEAR ? 1 : 2) * widened, middle = (at + 0.5) * scale, narrow = 1 / widened;
    const long from = (long)(middle - support + 0.5), to = (long)(middle + support + 0.5);
    const long first = from < 0 ? 0 : from, last = to > in ? in : to;
    std::vector<double> weights(last - first);
    double sum = 0;
    for (long i = 0; i < last - first; i++) sum += weights[i] = weight(filter, (i + first - middle + 0.5) * narrow);
    Taps made{first, last - first, {}};
    for (double one : weights) {
        const double part = sum != 0 ? one / sum : one;
        made.factors.push_back((int32_t)(part * (1 << BITS) + (part < 0 ? -0.5 : 0.5)));
    }
    return made;
}

inline uint8_t level(int32_t sum) {
    const int32_t whole = sum >> BITS;
    return whole < 0 ? 0 : whole > 255 ? 255 : whole;
}

// `factors`: each four times, for a pixel's four bytes. Four rows at once, which share them.
void one_across(const uint8_t *const *rows, const int32_t *factors, long count, uint8_t *const *to) {
    for (int row = 0; row < 4; row++) {
        int32_t sums[4] = {HALF, HALF, HALF, HALF};
        for (long i = 0; i < count * 4; i++) sums[i % 4] += rows[row][i] * factors[i];
        for (int c = 0; c < 4; c++) to[row][c] = level(sums[c]);
    }
}

void one_down(const uint8_t *from, long stride, const int32_t *factors, long count, long begin, long numbers,
              uint8_t *to) {
    for (long x = begin; x < numbers; x++) {
        int32_t sum = HALF;
        for (long i = 0; i < count; i++) sum += from[i * stride + x] * factors[i];
        to[x] = level(sum);
    }
}

#if defined(__x86_64__) && !defined(WITHOUT_AVX2)
#define AVX2 __attribute__((target("avx2")))

AVX2 inline __m256i eight(const uint8_t *at) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)at)); }

AVX2 void one_across_avx2(const uint8_t *const *rows, const int32_t *factors, long count, uint8_t *const *to) {
    __m256i sums[4] = {};
    for (long i = 0; i + 1 < count; i += 2) {
        const __m256i by = _mm256_loadu_si256((const __m256i *)(factors + i * 4));
#pragma GCC unroll 4
        for (int row = 0; row < 4; row++)
            sums[row] = _mm256_add_epi32(sums[row], _mm256_mullo_epi32(eight(rows[row] + i * 4), by));
    }
#pragma GCC unroll 4
    for (int row = 0; row < 4; row++) {
        __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(sums[row]), _mm256_extracti128_si256(sums[row], 1));
        if (count % 2) {
            int32_t last;
            memcpy(&last, rows[row] + (count - 1) * 4, 4);
            const __m128i by = _mm_loadu_si128((const __m128i *)(factors + (count - 1) * 4));
            sum = _mm_add_epi32(sum, _mm_mullo_epi32(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(last)), by));
        }
        sum = _mm_srai_epi32(_mm_add_epi32(sum, _mm_set1_epi32(HALF)), BITS);
        const __m128i levels = _mm_packs_epi32(sum, sum);
        const int32_t pixel = _mm_cvtsi128_si32(_mm_packus_epi16(levels, levels));
        memcpy(to[row], &pixel, 4);
    }
}

AVX2 void one_down_avx2(const uint8_t *from, long stride, const int32_t *factors, long count, long numbers,
                        uint8_t *to) {
    long x = 0;
    for (; x + 32 <= numbers; x += 32) {
        __m256i sums[4];
        for (int part = 0; part < 4; part++) sums[part] = _mm256_set1_epi32(HALF);
        for (long i = 0; i < count; i++) {
            const __m256i by = _mm256_set1_epi32(factors[i]);
#pragma GCC unroll 4
            for (int part = 0; part < 4; part++)
                sums[part] = _mm256_add_epi32(
                    sums[part], _mm256_mullo_epi32(eight(from + i * stride + x + part * 8), by));
        }
        for (int part = 0; part < 4; part++) sums[part] = _mm256_srai_epi32(sums[part], BITS);
        const __m256i low = _mm256_packs_epi32(sums[0], sums[1]), high = _mm256_packs_epi32(sums[2], sums[3]);
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing keeps the halves apart
        _mm256_storeu_si256((__m256i *)(to + x), _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order));
    }
    one_down(from, stride, factors, count, x, numbers, to);
}

const bool FAST = __builtin_cpu_supports("avx2");
#else
const bool FAST = false;
void one_across_avx2(const uint8_t *const *, const int32_t *, long, uint8_t *const *) {}
void one_down_avx2(const uint8_t *, long, const int32_t *, long, long, uint8_t *) {}
#endif

// Rows whose pixels begin at column `begin` of `in` → columns [at, at + width) of `out`, densely.
void all_across(const uint8_t *from, long stride, long rows, int filter, long in, long out, long at, long width,
                long begin, uint8_t *to) {
    if (in == out) {
        for (long y = 0; y < rows; y++) memcpy(to + y * width * 4, from + y * stride + (at - begin) * 4, width * 4);
        return;
    }
    std::vector<Taps> all;
    for (long x = 0; x < width; x++) {
        all.push_back(taps(filter, in, out, at + x));
        std::vector<int32_t> fourfold;
        for (int32_t factor : all[x].factors) fourfold.insert(fourfold.end(), 4, factor);
        all[x].factors = fourfold;
    }
    for (long y = 0; y < rows; y += 4) {
        const uint8_t *lines[4], *starts[4];
        uint8_t *results[4];
        for (long i = 0; i < 4; i++) {
            const long row = y + i < rows ? y + i : rows - 1;  // the last, once more
            lines[i] = from + row * stride;
            results[i] = to + row * width * 4;
        }
        for (const Taps &one : all) {
            for (int i = 0; i < 4; i++) starts[i] = lines[i] + (one.first - begin) * 4;
            (FAST ? one_across_avx2 : one_across)(starts, one.factors.data(), one.count, results);
            for (int i = 0; i < 4; i++) results[i] += 4;
        }
    }
}

// Rows that begin at `begin` of `in` → rows [at, at + rows) of `out`, densely.
void all_down(const uint8_t *from, long stride, long width, int filter, long in, long out, long at, long rows,
              long begin, uint8_t *to) {
    for (long y = 0; y < rows; y++, to += width * 4) {
        if (in == out) {
            memcpy(to, from + (at + y - begin) * stride, width * 4);
            continue;
        }
        const Taps one = taps(filter, in, out, at + y);
        const uint8_t *start = from + (one.first - begin) * stride;
        if (FAST)
            one_down_avx2(start, stride, one.factors.data(), one.count, width * 4, to);
        else
            one_down(start, stride, one.factors.data(), one.count, 0, width * 4, to);
    }
}

// 0; 1: there is not enough memory.
template <typename Work> int tried(Work work) {
    try {
        work();
        return 0;
    } catch (...) {
        return 1;
    }
}

}  // namespace

extern "C" {

// Where what pixels [at, at + count) of a side are made from begins and ends.
int reach(int filter, long in, long out, long at, long count, long *begin, long *end) {
    return tried([=] {
        const Taps first = taps(filter, in, out, at), last = taps(filter, in, out, at + count - 1);
        *begin = in == out ? at : first.first;
        *end = in == out ? at + count : last.first + last.count;
    });
}

int across(const uint8_t *from, long stride, long rows, int filter, long in, long out, long at, long width, long begin,
           uint8_t *to) {
    return tried([=] { all_across(from, stride, rows, filter, in, out, at, width, begin, to); });
}

int down(const uint8_t *from, long stride, long width, int filter, long in, long out, long at, long rows, long begin,
         uint8_t *to) {
    return tried([=] { all_down(from, stride, width, filter, in, out, at, rows, begin, to); });
}
}
