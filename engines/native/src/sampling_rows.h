// The rows' loops, compiled for each instruction set. Included once per translation unit.

#include <algorithm>

#include "sampling.h"
#include "threads.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace outrider::OUTRIDER_ISA {
namespace {

#if defined(__AVX512BF16__)

constexpr int64_t kStep = 16;

inline __m512 load(const float* from) { return _mm512_loadu_ps(from); }

inline __m512 load(const bf16* from) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline __m512 sane16(__m512 logits) {
    const __mmask16 is_nan = _mm512_cmp_ps_mask(logits, logits, _CMP_UNORD_Q);
    const __m512 finite = _mm512_min_ps(logits, _mm512_set1_ps(std::numeric_limits<float>::max()));
    return _mm512_mask_mov_ps(finite, is_nan, _mm512_set1_ps(-std::numeric_limits<float>::infinity()));
}

// The hash of eight tokens, of which `counters` holds key + token * golden.
inline __m512i mix8(__m512i bits) {
    bits = _mm512_mullo_epi64(_mm512_xor_si512(bits, _mm512_srli_epi64(bits, 30)), _mm512_set1_epi64(kMix1));
    bits = _mm512_mullo_epi64(_mm512_xor_si512(bits, _mm512_srli_epi64(bits, 27)), _mm512_set1_epi64(kMix2));
    return _mm512_xor_si512(bits, _mm512_srli_epi64(bits, 31));
}

// Upper bounds of the noise of eight tokens, in units of log 2.
inline __m256 noise_bounds(__m512i counters) {
    const __m512i complement = _mm512_xor_si512(mix8(counters), _mm512_set1_epi64(-1));
    return _mm512_cvtepi64_ps(_mm512_add_epi64(_mm512_lzcnt_epi64(complement), _mm512_set1_epi64(1)));
}

template <typename Logit>
float largest(const Logit* logits, int64_t vocab) {
    __m512 best = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    int64_t token = 0;
    for (; token + kStep <= vocab; token += kStep) best = _mm512_max_ps(best, sane16(load(logits + token)));
    float result = _mm512_reduce_max_ps(best);
    for (; token < vocab; ++token) result = std::max(result, sane(to_float(logits[token])));
    return result;
}

// The first token with this logit, which is one of them.
template <typename Logit>
int64_t first_of(const Logit* logits, int64_t vocab, float value) {
    int64_t token = 0;
    for (; token + kStep <= vocab; token += kStep) {
        const uint32_t hits = _mm512_cmp_ps_mask(sane16(load(logits + token)), _mm512_set1_ps(value), _CMP_EQ_OQ);
        if (hits) return token + __builtin_ctz(hits);
    }
    while (sane(to_float(logits[token])) != value) ++token;
    return token;
}

// Tokens [0, returned) are looked at, sixteen at a time; `examine` is called for those that might win.
template <typename Logit, typename Examine>
int64_t scan(const Logit* logits, int64_t vocab, float top, float temperature, uint64_t key, const Best& best,
             Examine examine) {
    const __m512i lanes = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
    __m512i low = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(key)),
                                   _mm512_mullo_epi64(lanes, _mm512_set1_epi64(static_cast<int64_t>(kGolden))));
    const __m512i eight = _mm512_set1_epi64(static_cast<int64_t>(8 * kGolden));
    const __m512 divisor = _mm512_set1_ps(temperature);
    int64_t token = 0;
    for (; token + kStep <= vocab; token += kStep) {
        const __m512i high = _mm512_add_epi64(low, eight);
        const __m512 bounds = _mm512_insertf32x8(_mm512_castps256_ps512(noise_bounds(low)), noise_bounds(high), 1);
        low = _mm512_add_epi64(high, eight);
        const __m512 scores = _mm512_div_ps(_mm512_sub_ps(sane16(load(logits + token)), _mm512_set1_ps(top)), divisor);
        const __m512 most = _mm512_fmadd_ps(bounds, _mm512_set1_ps(kLog2), scores);
        // A thousandth covers the rounding of these sums; it lets next to nothing more through.
        const __m512 needed = _mm512_set1_ps(best.value - 1e-3f);
        uint32_t candidates = _mm512_cmp_ps_mask(most, needed, _CMP_GE_OQ);
        for (; candidates; candidates &= candidates - 1) examine(token + __builtin_ctz(candidates));
    }
    return token;
}

// exp(x) for x <= 0, relative error below 2e-7 (range reduction by log 2, a polynomial of degree 6).
inline __m512 exp16(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
    const __m512 power = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 rest = _mm512_fnmadd_ps(power, _mm512_set1_ps(0.693359375f), x);
    rest = _mm512_fnmadd_ps(power, _mm512_set1_ps(-2.12194440e-4f), rest);
    __m512 sum = _mm512_set1_ps(1.0f / 720);
    for (const float coefficient : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
        sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(coefficient));
    }
    return _mm512_scalef_ps(sum, power);
}

template <typename Logit>
double mass_of(const Logit* logits, int64_t vocab, float top) {
    __m512 sum = _mm512_setzero_ps();
    int64_t token = 0;
    for (; token + kStep <= vocab; token += kStep) {
        sum = _mm512_add_ps(sum, exp16(_mm512_sub_ps(sane16(load(logits + token)), _mm512_set1_ps(top))));
    }
    double result = _mm512_reduce_add_ps(sum);
    for (; token < vocab; ++token) result += std::exp(sane(to_float(logits[token])) - top);
    return result;
}

#else

template <typename Logit>
float largest(const Logit* logits, int64_t vocab) {
    float result = -std::numeric_limits<float>::infinity();
    for (int64_t token = 0; token < vocab; ++token) result = std::max(result, sane(to_float(logits[token])));
    return result;
}

// `value` is one of the logits.
template <typename Logit>
int64_t first_of(const Logit* logits, int64_t, float value) {
    int64_t token = 0;
    while (sane(to_float(logits[token])) != value) ++token;
    return token;
}

template <typename Logit, typename Examine>
int64_t scan(const Logit* logits, int64_t vocab, float top, float temperature, uint64_t key, const Best& best,
             Examine examine) {
    for (int64_t token = 0; token < vocab; ++token) {
        const uint64_t complement = ~mix(key + static_cast<uint64_t>(token) * kGolden);
        const int zeros = complement ? __builtin_clzll(complement) : 64;
        const float score = (sane(to_float(logits[token])) - top) / temperature;
        if (score + static_cast<float>(zeros + 1) * kLog2 >= best.value - 1e-3f) examine(token);
    }
    return vocab;
}

template <typename Logit>
double mass_of(const Logit* logits, int64_t vocab, float top) {
    double result = 0;
    for (int64_t token = 0; token < vocab; ++token) result += std::exp(sane(to_float(logits[token])) - top);
    return result;
}

#endif

template <typename Logit>
int64_t draw(const Logit* logits, int64_t vocab, float temperature, int64_t seed, int64_t position) {
    const float top = largest(logits, vocab);
    // Every token is banned: one must be emitted, and it is the lowest id.
    if (top == -std::numeric_limits<float>::infinity()) return 0;
    const int64_t likeliest = first_of(logits, vocab, top);
    if (temperature == 0) return likeliest;
    const uint64_t key = noise_key(seed, position);
    Best best{-std::numeric_limits<float>::infinity(), vocab};
    const auto examine = [&](int64_t token) {
        const float score = (sane(to_float(logits[token])) - top) / temperature;
        best.offer(score + gumbel(mix(key + static_cast<uint64_t>(token) * kGolden)), token);
    };
    examine(likeliest);
    for (int64_t token = scan(logits, vocab, top, temperature, key, best, examine); token < vocab; ++token) {
        examine(token);
    }
    return best.token;
}

template <typename Logit>
float believe(const Logit* logits, int64_t vocab, int64_t token) {
    const float top = largest(logits, vocab);
    const float chosen = to_float(logits[token]);
    // Of a row without a finite logit there is nothing to believe.
    if (!std::isfinite(top) || std::isnan(chosen)) return std::numeric_limits<float>::quiet_NaN();
    return static_cast<float>(std::exp(static_cast<double>(sane(chosen) - top)) / mass_of(logits, vocab, top));
}

template <typename Call, typename Row>
void each_row(const Call& call, Row row) {
    parallel_for(call.num_threads, call.num_rows, [&](int64_t i) {
        if (call.is_bf16) {
            row(i, static_cast<const bf16*>(call.logits) + i * call.row_stride);
        } else {
            row(i, static_cast<const float*>(call.logits) + i * call.row_stride);
        }
    });
}

}  // namespace

void draw_rows(const Draws& draws) {
    each_row(draws, [&](int64_t i, const auto* logits) {
        draws.token_ids[i] = draw(logits, draws.vocab, draws.temperatures[i], draws.seeds[i], draws.positions[i]);
    });
}

void believe_rows(const Beliefs& beliefs) {
    each_row(beliefs, [&](int64_t i, const auto* logits) {
        beliefs.probabilities[i] = believe(logits, beliefs.vocab, beliefs.token_ids[i]);
    });
}

}  // namespace outrider::OUTRIDER_ISA
