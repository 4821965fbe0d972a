// What the bindings hand to the kernels, and the table of entry points that each instruction set fills.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ota {

constexpr int kMaxExperts = 64;
constexpr int kBins = 1 << 16;

// Codes shared with ota_kernels/tensors/dtypes.py.
enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3, f8_e4m3 = 4, f8_e5m2 = 5 };

struct Operand {
    const uint8_t* data = nullptr;  // element 0 of the tile; may be unaligned
    DType dtype = DType::f32;
};

// Where an operand's bytes lie in an open file; fd below 0: nowhere.
struct FilePlace {
    int fd = -1;
    int64_t offset = 0;  // of element 0
};

enum class CurvatureKind : int { uniform = 0, full = 1, rank1 = 2, low_rank = 3, log8 = 4 };

// full: values. rank1: h = rows[i] * columns[j]. low_rank: h = max(0, sum_r rows[i, r] * columns[r, j]).
// log8: h = level(codes[i, j]) * rows[i].
struct Curvature {
    CurvatureKind kind = CurvatureKind::uniform;
    Operand values;
    const uint8_t* codes = nullptr;  // element 0 of the tile
    const float* rows = nullptr;
    const float* columns = nullptr;
    int64_t n_columns = 0;
    int64_t rank = 1;
    int64_t start = 0;  // flat index of the tile's first element in its matrix
};

struct Expert {
    Operand weights;
    Curvature curvature;
    float threshold = 0;     // of the scaled saliency; NaN keeps nothing
    float score_scale = 1;   // k in s = (h k) (2^16 d)^2
    double weight_scale = 1; // a in P = a h^p + eps, or P = a
    double edit_scale = 1;   // rescale factor of the masked edit
    float trim = 0;          // least |d| that survives TIES trimming
    uint32_t span = 0;       // scores of threshold and the span - 1 next float32 numbers are undecided
    int64_t* census = nullptr;  // kCensus counts of the scores, or none
};

// A census of scores outside the expert's own bracket: sums of significands by exponent, of scores up to the
// bracket's end, then of those above it; last, how many are above.
constexpr int kExponents = 256;
constexpr int kCensus = 2 * kExponents + 1;

// Elements that lists of candidates have room for beyond a tile's: a whole vector is written at their end.
constexpr int kSpare = 16;

// Elements that one expert's bracket alone leaves undecided. They are merged as if the expert kept them; merged:
// their values where it does not. The highest bit of index is set where no other expert keeps the element.
struct Alternatives {
    int64_t count = 0;
    uint32_t* index = nullptr;
    uint32_t* steps = nullptr;
    uint8_t* merged = nullptr;
};

// Where elements go that some expert's bracket leaves undecided: their index in the tile and their operands,
// weights as they are stored, curvature as float32 (nowhere for uniform curvature). steps: for experts with a
// bracket, how many float32 numbers each score in it lies above its lowest. Elements from `resolved` on are to
// become alternatives of the one expert that they wait for; what they all keep stays. Room for a whole tile
// and kSpare more.
struct Candidates {
    int64_t count = 0, resolved = 0;
    uint32_t* index = nullptr;
    uint8_t* base = nullptr;
    uint8_t* weights[kMaxExperts] = {};
    float* curvature[kMaxExperts] = {};
    uint32_t* steps[kMaxExperts] = {};
    int64_t n_steps[kMaxExperts] = {};
    Alternatives alternatives[kMaxExperts];
    bool overflowed = false;  // whether a result of those was beyond the output type's range: all stay
};

struct Formula {
    double power = 0.5;
    double epsilon = 0;
    double lambda = 1;
    double denominator = 0;  // 0: the sum of the P_t; else this number
    bool curvature_weights = true;
    bool masked = true;      // false: every threshold keeps everything, scores are not computed
    bool mask_weights = true;
    bool elect_signs = false;
    bool fallback_to_base = true;
    bool repair_nonfinite = false;  // write the base value where an input is not finite
};

struct NonFinite {
    int64_t count = 0;
    int64_t first = -1;  // index within the tile
    void add(int64_t index) {
        if (first < 0) first = index;
        ++count;
    }
};

// Candidates count nowhere but as not finite, and in `reached`; alternatives not as kept by their expert.
struct MergeStats {
    int64_t kept[kMaxExperts] = {};
    int64_t reached[kMaxExperts] = {};  // scores from the threshold, or from the bracket's lowest, up
    int64_t unkept = 0;    // elements kept by nobody
    int64_t overflow = 0;  // finite results beyond the output type's range
    int64_t repaired = 0;  // elements set to the base value
    NonFinite base, weights[kMaxExperts], curvature[kMaxExperts];
};

struct MergeArgs {
    int64_t n = 0;
    int n_experts = 0;
    bool has_base = false;
    Operand base;
    Expert experts[kMaxExperts];
    Formula formula;
    uint8_t* out = nullptr;  // overlaps no input
    DType out_dtype = DType::f32;
    Candidates* candidates = nullptr;  // none where nothing is undecided
};

enum class Score : int { saliency = 0, edit = 1 };

struct SurveyArgs {
    int64_t n = 0;
    bool has_base = false;
    Operand base;
    Expert expert;
    Score score = Score::saliency;  // edit: |d| where the saliency reaches the threshold, else excluded
};

// Runs of `length` neighbouring elements that begin at `starts`, of some experts' inputs (one base). Inputs that have
// a place in a file are read there, `together` runs, of 1024 elements at most, with one read; others in memory.
struct RunArgs {
    const SurveyArgs* of_experts = nullptr;
    int n_experts = 0;
    const int64_t* starts = nullptr;
    int64_t count = 0;
    int length = 0;
    int together = 1;
    FilePlace base, weights[kMaxExperts], curvature[kMaxExperts];
};

struct SurveyStats {
    NonFinite base, weights, curvature;
};

// How many of some values are inside of a range, and how many above it.
struct Between {
    int64_t inside = 0, above = 0;
};

struct Kernels {
    void (*merge)(const MergeArgs&, MergeStats&);
    // prefix < 0: counts[bits >> 16] and the sum of bits & 0xffff of each bin; prefix >= 0: counts of the
    // low halves of the scores whose high half is prefix (lows unused).
    void (*histogram)(const SurveyArgs&, int64_t prefix, int64_t* counts, int64_t* lows, SurveyStats&);
    void (*edits)(const SurveyArgs&, float* out, SurveyStats&);
    void (*scores)(const SurveyArgs&, float* out, SurveyStats&);
    // The scores of each expert t at the runs, to out[t][run, element]. -1, or whose file could not be read: 0 the
    // base's, 1 + 2 t the weights', 2 + 2 t the curvature's.
    int (*run_scores)(const RunArgs&, float* const* out);
    // Values from low to below high, one after the other; out has room for all of them and a vector more.
    Between (*between)(const float* values, int64_t n, float low, float high, float* out);
    // Of rows of values: how many are at least `least`; the sum over pairs of neighbouring rows of the squared
    // difference. An odd last row is left out.
    int64_t (*squared_differences)(const float* values, int64_t rows, int64_t length, float least);
    double (*power_sum)(const Curvature&, int64_t n, double power, NonFinite&);
    void (*row_column_sums)(const Curvature&, int64_t rows, int64_t columns, double* row_sums,
                            double* column_sums, NonFinite&);
};

namespace base { extern const Kernels kernels; }
namespace v3 { extern const Kernels kernels; }
namespace v4 { extern const Kernels kernels; }

}  // namespace ota
