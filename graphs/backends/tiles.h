// What the kernels of this folder share.

#pragma once

#if defined(__clang__) || !defined(__GNUC__)
#error "GCC is needed: another compiler's OpenMP would bring a second pool of threads beside PyTorch's"
#endif

#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace {

typedef uint16_t bf16;

inline long up(long value, long multiple) { return (value + multiple - 1) / multiple * multiple; }

inline __m512 widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

const float LOG2E = 1.44269504f;

// 2^x, within 2e-7 of it. Minus infinity gives 0: scalef(NaN, -inf) is +0 by its definition.
inline __m512 exp2(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 part = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(1.33336498402e-3f);
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(9.61813770135e-3f));
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(5.55035711034e-2f));
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(2.40226510709e-1f));
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(6.93147182465e-1f));
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, whole);
}

#ifdef __AMX_BF16__
struct alignas(64) TileConfig {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

// All eight tiles of this thread, 16 rows of 64 bytes each, while it lasts.
class Tiles {
    TileConfig before;

  public:
    Tiles() {
        const TileConfig all = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
        _tile_storeconfig(&before);  // whoever uses tiles on this thread too finds them as they were
        _tile_loadconfig(&all);
    }
    ~Tiles() { _tile_loadconfig(&before); }
};
#endif

}  // namespace
