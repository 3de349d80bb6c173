// What generated TPC-C uses, on a CPU: types, intrinsics, the index space, and a check of every access.
//
// Where Intel's documentation leaves something open, the choice here is the one that a kernel must not rely on being
// another: the two vectors that bf16 is converted to hold even and odd elements, and a reduction leaves its sum in
// the first lane of each group of 16 and no number in the others.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

constexpr int LANES = 64, GROUP = 16, DIMS = 5;

struct int5 {
    int at[DIMS];
    int operator[](int d) const { return at[d]; }
};

inline int5 operator+(int5 a, int5 b) {
    for (int d = 0; d < DIMS; ++d) a.at[d] += b.at[d];
    return a;
}

struct float64 {
    float lane[LANES];
    float64() = default;
    float64(float value) {
        for (float& l : lane) l = value;
    }
};

template <class F> float64 each(F f) {
    float64 r;
    for (int i = 0; i < LANES; ++i) r.lane[i] = f(i);
    return r;
}

inline float64 operator+(float64 a, float64 b) { return each([&](int i) { return a.lane[i] + b.lane[i]; }); }
inline float64 operator-(float64 a, float64 b) { return each([&](int i) { return a.lane[i] - b.lane[i]; }); }
inline float64 operator*(float64 a, float64 b) { return each([&](int i) { return a.lane[i] * b.lane[i]; }); }
inline float64 operator-(float64 a) { return each([&](int i) { return -a.lane[i]; }); }
inline float64 v_f32_max_b(float64 a, float64 b) { return each([&](int i) { return std::fmax(a.lane[i], b.lane[i]); }); }
inline float64 v_f32_min_b(float64 a, float64 b) { return each([&](int i) { return std::fmin(a.lane[i], b.lane[i]); }); }
inline float64 v_f32_abs_b(float64 a) { return each([&](int i) { return std::fabs(a.lane[i]); }); }
inline float64 v_exp_f32(float64 a) { return each([&](int i) { return std::exp(a.lane[i]); }); }
inline float64 v_tanh_f32(float64 a) { return each([&](int i) { return std::tanh(a.lane[i]); }); }
inline float64 v_sqrt_f32(float64 a) { return each([&](int i) { return std::sqrt(a.lane[i]); }); }
inline float64 v_rsqrt_f32(float64 a) { return each([&](int i) { return 1.0f / std::sqrt(a.lane[i]); }); }
inline float64 v_reciprocal_f32(float64 a) { return each([&](int i) { return 1.0f / a.lane[i]; }); }
inline float64 v_div_f32(float64 a, float64 b) { return each([&](int i) { return a.lane[i] / b.lane[i]; }); }

inline float64 v_f32_reduce_add(float64 a) {
    float sum = 0;
    for (float l : a.lane) sum += l;
    return each([&](int i) { return i % GROUP ? std::numeric_limits<float>::quiet_NaN() : sum; });
}

struct uchar256 {
    int value;
    explicit uchar256(int v) : value(v) {}
};

extern const char* problem;  // the first that was seen

inline float64 v_f32_shuffle_b(float64 a, uchar256 pattern, int, float64) {
    if (pattern.value != 0x80) problem = "a shuffle that is not known here";
    return each([&](int i) { return a.lane[i - i % GROUP]; });
}

struct bfloat128 {
    uint16_t lane[2 * LANES];
};
struct float128 {
    float64 v1, v2;
};
constexpr int SW_RHNE = 0;

inline float128 v_convert_bf16_to_f32_all_b(bfloat128 a, int) {
    auto wide = [&](int i) {
        uint32_t bits = uint32_t(a.lane[i]) << 16;
        float f;
        std::memcpy(&f, &bits, 4);
        return f;
    };
    return {each([&](int i) { return wide(2 * i); }), each([&](int i) { return wide(2 * i + 1); })};
}

inline bfloat128 v_convert_f32_to_bf16_all_b(float128 a, int) {
    bfloat128 r;
    for (int i = 0; i < 2 * LANES; ++i) {
        const float f = (i % 2 ? a.v2 : a.v1).lane[i / 2];
        uint32_t bits;
        std::memcpy(&bits, &f, 4);
        r.lane[i] = std::isnan(f) ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
    return r;
}

// A tensor: sizes by TPC dimension (0 is innermost), and what the current piece of work may touch of it.
struct Tensor {
    void* data;
    int64_t size[DIMS];
    int first[DIMS], last[DIMS];
    bool written;
};
using tensor = Tensor*;

extern int5 space_offset, space_size;
inline int5 get_index_space_offset() { return space_offset; }
inline int5 get_index_space_size() { return space_size; }

// Calls f(element of the tensor, lane) for the lanes that lie in the tensor; those must be ones that it may touch.
template <class F> void elements(int5 at, tensor t, int lanes, F f) {
    for (int lane = 0; lane < lanes; ++lane) {
        int64_t index = 0, stride = 1;
        bool inside = true, allowed = true;
        for (int d = 0; d < DIMS; ++d) {
            const int64_t place = at[d] + (d == 0 ? lane : 0);
            inside = inside && 0 <= place && place < t->size[d];
            allowed = allowed && t->first[d] <= place && place <= t->last[d];
            index += place * stride;
            stride *= t->size[d];
        }
        if (!inside) continue;
        if (!allowed) problem = "an access beyond the access pattern";
        f(index, lane);
    }
}

template <class Vector, class Element> Vector load(int5 at, tensor t, int lanes) {
    Vector r;
    for (int i = 0; i < lanes; ++i) r.lane[i] = 0;
    if (t->written) problem = "a load from a result";
    elements(at, t, lanes, [&](int64_t index, int lane) { r.lane[lane] = static_cast<Element*>(t->data)[index]; });
    return r;
}

template <class Vector, class Element> void store(int5 at, tensor t, Vector v, int lanes) {
    if (!t->written) problem = "a store to an input";
    elements(at, t, lanes, [&](int64_t index, int lane) { static_cast<Element*>(t->data)[index] = v.lane[lane]; });
}

inline float64 v_f32_ld_tnsr_b(int5 at, tensor t) { return load<float64, float>(at, t, LANES); }
inline bfloat128 v_bf16_ld_tnsr_b(int5 at, tensor t) { return load<bfloat128, uint16_t>(at, t, 2 * LANES); }
inline void v_f32_st_tnsr(int5 at, tensor t, float64 v) { store<float64, float>(at, t, v, LANES); }
inline void v_bf16_st_tnsr(int5 at, tensor t, bfloat128 v) { store<bfloat128, uint16_t>(at, t, v, 2 * LANES); }
