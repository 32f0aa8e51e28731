// Attention over short sequences in bfloat16, for processors with AMX: softmax(q kᵀ · scale + mask) v.
//
// One (batch, head) after the other, whole in the first cache: keys and values are laid out for the tile unit once, up
// to 64 queries are multiplied with all keys, their scores stay in float32 through the softmax, and are rounded to
// bfloat16 only as factors of the values. A row's bits depend on its own numbers alone, not on batch or threads.
//
// Tiles: A 16 rows of 32 bfloat16; B 16 rows of 16 pairs (two numbers that are added up side by side); C 16 x 16 float32.

#include "tiles.h"

#include <sys/syscall.h>
#include <unistd.h>

namespace {

enum Mask { NONE, BASE2, SHORT, KEPT };  // float32, times log2(e) already; bfloat16, as it is; bytes, 0: not looked at

const float LOWEST = -2e38f, LEAST = -3.4e38f;
const long MOST_QUERIES = 64;

struct Strides {  // in numbers; [batch, head, token, …], the last dimension dense
    long batch, head, token;
};

inline uint32_t first(long count) { return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1; }

// 16 rows of 16 words → their columns
inline void transpose(const __m512i *rows, uint32_t *to) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        a[i] = _mm512_shuffle_i32x4(b[i], b[4 + i], 0x88);
        a[4 + i] = _mm512_shuffle_i32x4(b[i], b[4 + i], 0xdd);
        a[8 + i] = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88);
        a[12 + i] = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        _mm512_store_si512(to + i * 16, _mm512_shuffle_i32x4(a[i], a[8 + i], 0x88));
        _mm512_store_si512(to + (4 + i) * 16, _mm512_shuffle_i32x4(a[4 + i], a[12 + i], 0x88));
        _mm512_store_si512(to + (8 + i) * 16, _mm512_shuffle_i32x4(a[i], a[8 + i], 0xdd));
        _mm512_store_si512(to + (12 + i) * 16, _mm512_shuffle_i32x4(a[4 + i], a[12 + i], 0xdd));
    }
}

// A, row by row: [rows up to 32, width up to 32], zeros around
void lay_out_queries(const bf16 *from, long step, long count, long width, bf16 *to) {
    const long chunks = up(width, 32) / 32;
    for (long i = 0; i < up(count, 32); i++)
        for (long c = 0; c < chunks; c++) {
            const uint32_t part = i < count ? first(width - c * 32) : 0;
            _mm512_store_si512(to + (i * chunks + c) * 32, _mm512_maskz_loadu_epi16(part, from + i * step + c * 32));
        }
}

// B for q kᵀ: tiles of 16 keys and 32 numbers of each, [keys / 16][width / 32]
void lay_out_keys(const bf16 *from, long step, long count, long width, uint32_t *to) {
    const long chunks = up(width, 32) / 32;
    for (long t = 0; t < up(count, 32); t += 16)
        for (long c = 0; c < chunks; c++, to += 256) {
            __m512i rows[16];
            for (long i = 0; i < 16; i++) {
                const uint32_t part = t + i < count ? first(width - c * 32) : 0;
                rows[i] = _mm512_maskz_loadu_epi16(part, from + (t + i) * step + c * 32);
            }
            transpose(rows, to);
        }
}

// B for p v: tiles of 32 keys and 16 numbers of each, [keys / 32][width / 16]
void lay_out_values(const bf16 *from, long step, long count, long width, bf16 *to) {
    const long blocks = up(width, 16) / 16;
    const __m512i pairs = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                           39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    for (long t = 0; t < up(count, 32); t += 2)
        for (long n = 0; n < blocks; n++) {
            const uint16_t part = first(width - n * 16);
            const bf16 *at = from + t * step + n * 16;
            const __m256i one = _mm256_maskz_loadu_epi16(t < count ? part : 0, at);
            const __m256i two = _mm256_maskz_loadu_epi16(t + 1 < count ? part : 0, at + step);
            const __m512i both =
                _mm512_permutex2var_epi16(_mm512_castsi256_si512(one), pairs, _mm512_castsi256_si512(two));
            _mm512_store_si512(to + ((t / 32) * blocks + n) * 512 + (t % 32) * 16, both);
        }
}

// C [32, 32] at `to` = A [32, 32 · chunks] · B, whose tiles of two neighbouring columns begin at `one` and `two`
// (null: there is none) and lie `b_step` numbers apart
inline void multiply(const bf16 *a, long a_step, const bf16 *one, const bf16 *two, long b_step, long chunks, float *to,
                     long to_step) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long c = 0; c < chunks; c++) {
        _tile_loadd(4, a + c * 32, a_step * 2);
        _tile_loadd(6, one + c * b_step, 64);
        _tile_loadd(5, a + 16 * a_step + c * 32, a_step * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        if (two) {
            _tile_loadd(7, two + c * b_step, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, to, to_step * 4);
    _tile_stored(2, to + 16 * to_step, to_step * 4);
    if (two) {
        _tile_stored(1, to + 16, to_step * 4);
        _tile_stored(3, to + 16 * to_step + 16, to_step * 4);
    }
}

// One row of scores → its exponentials in bfloat16, not yet divided by their sum, which is returned.
// N: vectors of 16 keys, held in registers; 0: as many as there are, held in `scores`.
template <int N, Mask KIND>
float exponentials(float *scores, bf16 *to, long keys, const void *mask, float factor) {
    const __m512 times = _mm512_set1_ps(factor), none = _mm512_set1_ps(-__builtin_inff());
    const long count = N ? N : up(keys, 32) / 16;
    __m512 held[N ? N : 1], most = none;
#pragma GCC unroll 8
    for (long t = 0; t < count; t++) {
        const uint16_t part = first(keys - t * 16);
        __m512 x = _mm512_mul_ps(_mm512_load_ps(scores + t * 16), times);
        if (KIND == BASE2) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(part, (const float *)mask + t * 16));
        if (KIND == SHORT) {
            const __m256i m = _mm256_maskz_loadu_epi16(part, (const bf16 *)mask + t * 16);
            const __m512 wide = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(m), 16));
            // times log2(e) the lowest bfloat16 would be minus infinity, which says that a key is not looked at
            const __m512 within = _mm512_max_ps(wide, _mm512_set1_ps(LOWEST));
            const __mmask16 hidden = _mm512_cmp_ps_mask(wide, none, _CMP_EQ_OQ);
            x = _mm512_add_ps(x, _mm512_mask_mov_ps(_mm512_mul_ps(within, _mm512_set1_ps(LOG2E)), hidden, none));
        }
        if (KIND == KEPT) {
            const __mmask16 kept = _mm_mask_test_epi8_mask(part, _mm_maskz_loadu_epi8(part, (const char *)mask + t * 16),
                                                           _mm_set1_epi8(-1));
            x = _mm512_mask_blend_ps(kept, none, x);
        }
        x = _mm512_mask_blend_ps(part, none, x);
        if (N)
            held[N ? t : 0] = x;
        else
            _mm512_store_ps(scores + t * 16, x);
        most = _mm512_max_ps(most, x);
    }
    const __m512 top = _mm512_max_ps(_mm512_set1_ps(_mm512_reduce_max_ps(most)), _mm512_set1_ps(LEAST));
    __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 8
    for (long t = 0; t < count; t += 2) {
        const __m512 one = exp2(_mm512_sub_ps(N ? held[N ? t : 0] : _mm512_load_ps(scores + t * 16), top));
        const __m512 two = exp2(_mm512_sub_ps(N ? held[N ? t + 1 : 0] : _mm512_load_ps(scores + t * 16 + 16), top));
        sum = _mm512_add_ps(sum, _mm512_add_ps(one, two));
        _mm512_store_si512(to + t * 16, (__m512i)_mm512_cvtne2ps_pbh(two, one));
    }
    return _mm512_reduce_add_ps(sum);
}

typedef float (*Exponentials)(float *, bf16 *, long, const void *, float);

template <Mask KIND> Exponentials chosen(long keys) {
    switch (up(keys, 32) / 16) {
    case 2: return exponentials<2, KIND>;
    case 4: return exponentials<4, KIND>;
    case 6: return exponentials<6, KIND>;
    case 8: return exponentials<8, KIND>;
    default: return exponentials<0, KIND>;
    }
}

void fetch(const bf16 *from, long step, long count, long width) {
    for (long i = 0; i < count; i++)  // the line where a head's part of a row ends; where it begins the head before was
        _mm_prefetch(from + i * step + width - 1, _MM_HINT_T0);
}

}  // namespace

// Asks the system for the tile unit, which it lends a process once. Not 0: there is none.
extern "C" int attention_begin() { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */); }

// What is the same in every call of one place in a graph.
struct Attention {
    Strides query, key, value, out, mask;
    long heads, queries, keys, width, kind;
    float scale;
};

// `mask` repeats after `period` of the batch. Not 0: no memory.
extern "C" int attention(const Attention *of, const bf16 *query, const bf16 *key, const bf16 *value, bf16 *to,
                         const char *mask, long batch, long period, long threads) {
    const long heads = of->heads, queries = of->queries, keys = of->keys, width = of->width;
    const long padded = up(keys, 32), chunks = up(width, 32) / 32, blocks = up(width, 16) / 16;
    const long most = padded <= 128 ? MOST_QUERIES : 32, row = blocks * 16;
    const Mask kind = (Mask)of->kind;
    const float factor = of->scale * LOG2E;
    const Exponentials softmax = kind == NONE    ? chosen<NONE>(keys)
                                 : kind == BASE2 ? chosen<BASE2>(keys)
                                 : kind == SHORT ? chosen<SHORT>(keys)
                                                 : chosen<KEPT>(keys);
    const auto at = [](const Strides &step, long b, long h) { return b * step.batch + h * step.head; };
    const long wide = kind == BASE2 ? 4 : kind == SHORT ? 2 : 1;  // bytes of a number of the mask

    const long key_bytes = padded * chunks * 64, value_bytes = padded * row * 2, query_bytes = most * chunks * 64;
    const long score_bytes = most * padded * 4, factor_bytes = most * padded * 2, out_bytes = most * row * 4;
    const long bytes = key_bytes + value_bytes + query_bytes + score_bytes + factor_bytes + out_bytes;
    char *const space = (char *)aligned_alloc(64, bytes * threads);
    if (!space) return 1;

#pragma omp parallel num_threads(threads)
    {
        char *rest = space + bytes * omp_get_thread_num();
        const auto take = [&rest](long size) { return (void *)((rest += size) - size); };
        uint32_t *const k = (uint32_t *)take(key_bytes);
        bf16 *const v = (bf16 *)take(value_bytes), *const q = (bf16 *)take(query_bytes);
        float *const scores = (float *)take(score_bytes);
        bf16 *const factors = (bf16 *)take(factor_bytes);
        float *const out = (float *)take(out_bytes), sums[MOST_QUERIES] = {};

        const unsigned control = _mm_getcsr();
        _mm_setcsr(control | 0x8040);  // numbers below 2^-126 are zero: masks of -100 make many, each a hundred cycles
        const Tiles tiles;
#pragma omp for schedule(static)
        for (long n = 0; n < batch * heads; n++) {
            const long b = n / heads, h = n % heads;
            const bf16 *const own = query + at(of->query, b, h);
            if (n + 1 < batch * heads) {
                const long nb = (n + 1) / heads, nh = (n + 1) % heads;
                fetch(query + at(of->query, nb, nh), of->query.token, queries, width);
                fetch(key + at(of->key, nb, nh), of->key.token, keys, width);
                fetch(value + at(of->value, nb, nh), of->value.token, keys, width);
            }
            for (long begin = 0; begin < queries; begin += most) {
                const long count = queries - begin < most ? queries - begin : most;
                lay_out_queries(own + begin * of->query.token, of->query.token, count, width, q);
                if (!begin) {  // after the queries: a tile is read from memory some time after it was written there
                    lay_out_keys(key + at(of->key, b, h), of->key.token, keys, width, k);
                    lay_out_values(value + at(of->value, b, h), of->value.token, keys, width, v);
                }
                for (long i = 0; i < count; i += 32)
                    for (long t = 0; t < padded / 16; t += 2) {
                        const bf16 *const tile = (const bf16 *)k + t * chunks * 512;
                        multiply(q + i * chunks * 32, chunks * 32, tile, tile + chunks * 512, 512, chunks,
                                 scores + i * padded + t * 16, padded);
                    }
                const long step = of->mask.token * wide;
                const char *const its = kind == NONE ? nullptr : mask + at(of->mask, b % period, h) * wide + begin * step;
                for (long i = 0; i < count; i++)
                    sums[i] = softmax(scores + i * padded, factors + i * padded, keys, its + i * step, factor);
                for (long i = 0; i < count; i += 32)
                    for (long c = 0; c < blocks; c += 2)
                        multiply(factors + i * padded, padded, v + c * 512, c + 1 < blocks ? v + (c + 1) * 512 : nullptr,
                                 blocks * 512, padded / 32, out + i * row + c * 16, row);
                bf16 *row_to = to + at(of->out, b, h) + begin * of->out.token;
                for (long i = 0; i < count; i++, row_to += of->out.token) {
                    // a query that is left no key gets zeros, as PyTorch has it
                    const __m512 inverse = _mm512_set1_ps(sums[i] == 0.0f ? 0.0f : 1.0f / sums[i]);
                    for (long c = 0; c < width; c += 16) {
                        const __m512 x = _mm512_mul_ps(_mm512_load_ps(out + i * row + c), inverse);
                        _mm256_mask_storeu_epi16(row_to + c, first(width - c), (__m256i)_mm512_cvtneps_pbh(x));
                    }
                }
            }
        }
        _mm_setcsr(control);
    }
    free(space);
    return 0;
}
