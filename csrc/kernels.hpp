// What the bindings hand to the kernels, and the table of entry points that each instruction set fills. Words and
// numbers are those of ota_kernels/tensors/terms.py, which has the formulas.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ota {

constexpr int kMaxExperts = 64;
constexpr int kBins = 1 << 16;

// Codes shared with ota_kernels/tensors/dtypes.py.
enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3, f8_e4m3 = 4, f8_e5m2 = 5 };

inline int item_size(DType dtype) {
    switch (dtype) {
        case DType::f64: return 8;
        case DType::f32: return 4;
        case DType::bf16:
        case DType::f16: return 2;
        default: return 1;
    }
}

struct Operand {
    const uint8_t* data = nullptr;  // element 0 of the tile; may be unaligned. None: no such input
    DType dtype = DType::f32;
};

// Elements [start, stop) of a tensor of a packed expert: a base's elements and a pack's records (the format is in
// ota_kernels/io/README.md), decoded a stretch at a time (pack_records.hpp). What comes out is of `type` where values are
// exact, else float32, or float64 where `type` is.
enum class Values : int { exact, sign, shared };

struct Packed {
    const uint8_t* base = nullptr;     // element `start`
    const uint8_t* shared = nullptr;   // of the edit that experts share: its element `start`
    const uint8_t* records = nullptr;  // of the tiles from number `first` on. None: nothing is packed
    const uint8_t* end = nullptr;      // of all of them
    const int64_t *offsets = nullptr, *counts = nullptr;  // by tile: where its record begins, elements that are kept
    int64_t first = 0, tile = 1, numel = 0, start = 0, stop = 0;  // tile: elements of one; numel: of the tensor
    Values values = Values::exact;
    int size = 0;  // bytes of an element of the base
    DType type = DType::f32, shared_type = DType::bf16;
    double scale = 1;

    bool is_wide() const { return values != Values::exact && type == DType::f64; }
    DType out_type() const { return values == Values::exact || is_wide() ? type : DType::f32; }
    int out_size() const { return values == Values::exact ? size : is_wide() ? 8 : 4; }
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

// The words by their places in terms.WORDS.
enum class Edit : int { difference, clipped, by_chance };
enum class Score : int { none, saliency, curvature, magnitude, row_magnitude, spread };
enum class Select : int { all, at_least, between, above, random, random_by_rank };
enum class Elect : int { none, sum, count, largest, agreement };
enum class Weigh : int { constant, curvature, alone, by_row, by_column };
enum class Divide : int { number, weights, kept_weights, kept_count };

struct Words {
    Edit edit = Edit::difference;
    Score score = Score::saliency;
    Select select = Select::at_least;
    Elect elect = Elect::none;
    Weigh weigh = Weigh::curvature;
    Divide divide = Divide::kept_weights;

    bool read_curvature() const {
        return score == Score::saliency || score == Score::curvature || weigh == Weigh::curvature;
    }
};

// One expert's inputs and numbers; see ExpertTerms.
struct Expert {
    Operand weights, origin;  // no origin: the base
    Packed pack;              // that the weights are decoded from
    Curvature curvature;
    float threshold = 0, upper = 0;
    int64_t first = 0, last = 0, upto = 0;
    float score_scale = 1, vote = 1, trim = 0;
    double weight_scale = 1, edit_scale = 1, alone = 1;
    double probability = 1, spread = 0;
    uint32_t position = 0;
    uint32_t span = 0;
    int64_t* census = nullptr;          // kCensus counts of the scores, or none
    const double* weights_at = nullptr;  // of each row or column
    const float* row_scores = nullptr;
};

// See Terms.
struct Numbers {
    double power = 0.5, epsilon = 0, lambda = 1, denominator = 1, least = 0, clip = 0;
    float tie = 0, agreement = 0;
    int32_t needed = 1;
    bool fallback_to_base = true, zero_is_one = false, repair = false;
    uint64_t seed = 0, name_hash = 0;
};

// A tile's elements and what is to be computed of them.
struct Tile {
    int64_t n = 0;
    int64_t columns = 1;  // of a row of the tensor
    int64_t start = 0;    // flat index of element 0, unless:
    const int64_t* index = nullptr;  // flat index of each element
    int64_t ranked = 1, apart = 1;   // of `random by rank`: elements of a row, and how far apart they are
    Operand base;
    int n_experts = 0;
    Expert experts[kMaxExperts];
    Words words;
    Numbers numbers;

    bool has_base() const { return base.data != nullptr; }
    const Operand& origin(int t) const { return experts[t].origin.data != nullptr ? experts[t].origin : base; }
};

// A census of scores outside the expert's own bracket: sums of significands by exponent, of scores up to the
// bracket's end, then of those above it; last, how many are above. A sum may be spread over several exponents:
// what it stands for is exact.
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
// bracket, how many float32 numbers each score in it lies above its lowest. Room for a whole tile and kSpare more.
struct Candidates {
    int64_t count = 0;
    uint32_t* index = nullptr;
    uint8_t* base = nullptr;
    uint8_t* weights[kMaxExperts] = {};
    uint8_t* origins[kMaxExperts] = {};
    float* curvature[kMaxExperts] = {};
    uint32_t* steps[kMaxExperts] = {};
    int64_t n_steps[kMaxExperts] = {};
    Alternatives alternatives[kMaxExperts];
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
    int64_t overflow = 0;  // results beyond the output type's range
    int64_t repaired = 0;  // elements set to the base value
    NonFinite base, weights[kMaxExperts], curvature[kMaxExperts];
    int damaged = -1;  // an expert whose pack has a tile, number `damaged_tile`, with a record that is none
    int64_t damaged_tile = -1;
};

// N and D of a tile, elements of the accumulator's type, for a merge that goes on later: those of the experts before it
// (none of the first), and those with its own. Where nobody keeps the element, D has the sign bit. removes: the tile's
// experts are taken out again: their weights are negative.
struct Sums {
    const uint8_t *numerator = nullptr, *denominator = nullptr;
    uint8_t *new_numerator = nullptr, *new_denominator = nullptr;
    bool removes = false;
};

struct MergeArgs {
    const Tile& tile;
    uint8_t* out;  // overlaps no input
    DType out_dtype;
    Candidates* candidates;  // none where nothing is undecided
    Sums sums = {};          // none where the merge does not go on
};

struct SurveyStats {
    NonFinite base, weights, curvature;
};

// Runs of `length` neighbouring elements that begin at `starts`, of some experts' inputs. Inputs that have a place
// in a file are read there, `together` runs, of 1024 elements at most, with one read; others in memory.
struct RunArgs {
    const int* experts = nullptr;  // numbers
    int n_experts = 0;
    const int64_t* starts = nullptr;
    int64_t count = 0;
    int length = 0;
    int together = 1;
    FilePlace base, weights[kMaxExperts], origins[kMaxExperts], curvature[kMaxExperts];
};

// An input that could not be read.
struct Unread {
    enum class Role : int { none, base, weights, origin, curvature } role = Role::none;
    int expert = -1;
};

// How many of some values are inside of a range, and how many above it.
struct Between {
    int64_t inside = 0, above = 0;
};

// Scores from lowest to highest, and where those between the two go: room for the tile's elements and kSpare more, moved on
// by as many.
struct Interval {
    float lowest = 0, highest = 0;
    float* inside = nullptr;
};

constexpr int kMaxIntervals = 4;
constexpr int kAround = 4;  // counts: scores above the highest, equal to it, inside, equal to the lowest alone
constexpr int kCounted = 4096;  // elements that are counted together

enum class By : int { tensor, row, column };

// Sums of one expert's edits d and masks m over a tile.
constexpr int kSums = 6;
struct MaskedSums {
    double kept = 0, l1 = 0, kept_l1 = 0, kept_squares = 0;
    double shared = 0, unique = 0;  // elements kept by others too; by no other
};

// Of expert t of a tile.
struct Kernels {
    void (*merge)(const MergeArgs&, MergeStats&);
    // prefix < 0: counts[bits >> 16] and the sum of bits & 0xffff of each bin; prefix >= 0: counts of the
    // low halves of the scores whose high half is prefix (lows unused). of_edits: |d32| where it is kept, else 0.
    void (*histogram)(const Tile&, int t, bool of_edits, int64_t prefix, int64_t* counts, int64_t* lows, SurveyStats&);
    void (*edits)(const Tile&, int t, float* out, SurveyStats&);
    void (*scores)(const Tile&, int t, float* out, SurveyStats&);
    // How many scores are not 0; counts[pieces of kCounted elements][intervals][kAround], which are 0 before.
    int64_t (*around)(const Tile&, int t, Interval*, int intervals, int64_t* counts, SurveyStats&);
    // The scores of the experts at the runs, to out[number in `experts`][run, element].
    Unread (*run_scores)(const Tile&, const RunArgs&, float* const* out);
    // Values from low to below high, one after the other; out has room for all of them and kSpare more.
    Between (*between)(const float* values, int64_t n, float low, float high, float* out);
    // Of rows of values: how many are at least `least`; the sum over pairs of neighbouring rows of the squared
    // difference. An odd last row is left out.
    int64_t (*squared_differences)(const float* values, int64_t rows, int64_t length, float least);
    double (*power_sum)(const Curvature&, int64_t n, double power, NonFinite&);
    void (*row_column_sums)(const Curvature&, int64_t rows, int64_t columns, double* row_sums,
                            double* column_sums, NonFinite&);
    // Products of edits, in float64: out[groups][T][T]; rows and columns of whole rows.
    void (*gram)(const Tile&, By, double* out);
    void (*masked_sums)(const Tile&, MaskedSums* of_experts);
    // KL(softmax(w_t) + 1e-8 | softmax(w_0) + 1e-8) of each of the tile's whole rows.
    void (*row_divergence)(const Tile&, int t, double* out);
};

namespace base { extern const Kernels kernels; }
namespace v3 { extern const Kernels kernels; }
namespace v4 { extern const Kernels kernels; }

}  // namespace ota
