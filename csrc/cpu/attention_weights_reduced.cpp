// Reductions of attention weights, each in one pass over tiles of weights that never leave scratch.
//
// The sum over queries is cut like the weights themselves: a task is a tile of keys and goes down all queries. The
// others are sums along keys: a task is a few blocks of queries of one head, goes along the tiles of keys and packs
// them as it comes by (a block of 96 queries makes 96 products of each packed element). What many weights are added up
// to is float64, and always in the same order.
#include "attention_weights_reduced.h"

#include <algorithm>

#include "attention_weights_tile.h"
#include "parallel.h"
#include "scratch.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// A weight of a row and whose it is. Weights are not negative, so their bits are ordered as they are, and NaN, as in
// torch.topk, is above all numbers.
struct Candidate {
  uint64_t bits;
  int64_t key;
};

// Larger weights first, among equals the first key.
struct Before {
  bool operator()(const Candidate& a, const Candidate& b) const {
    return a.bits != b.bits ? a.bits > b.bits : a.key < b.key;
  }
};

inline uint64_t bits_of(float x) { return bit_cast<uint32_t>(x); }
inline uint64_t bits_of(double x) { return bit_cast<uint64_t>(x); }
inline void from_bits(uint64_t bits, float* x) { *x = bit_cast<float>(static_cast<uint32_t>(bits)); }
inline void from_bits(uint64_t bits, double* x) { *x = bit_cast<double>(bits); }

// The `wanted` best candidates of what has been offered, and some worse ones until they are in the way.
template <typename C>
class TopK {
 public:
  // With room for as many candidates again, throwing out the worse half costs each candidate O(1).
  static int64_t capacity(int64_t wanted) { return 2 * wanted + 4 * Vec<C>::kWidth; }

  void start(Candidate* memory) {
    best_ = memory;
    count_ = 0;
    threshold_ = 0;
    nothing_seen_ = true;
  }

  // Keys come in ascending order, so that one that equals the worst of the best comes too late.
  void offer(const C* w, int64_t width, int64_t first_key, int64_t wanted) {
    if (nothing_seen_) raise(w, width, wanted);
    nothing_seen_ = false;
    Vec<C> threshold = Vec<C>::set1(threshold_);
    for (int64_t j = 0; j < width; j += Vec<C>::kWidth) {
      const Vec<C> x = load(w + j);
      constexpr uint64_t kAll = (uint64_t{1} << Vec<C>::kWidth) - 1;
      uint64_t better = mask_bits(lt(threshold, x)) | (~mask_bits(eq(x, x)) & kAll);  // or NaN
      if (better == 0) continue;
      if (count_ + Vec<C>::kWidth > capacity(wanted)) {
        keep(wanted);
        threshold = Vec<C>::set1(threshold_);
      }
      for (; better != 0; better &= better - 1) {
        const int64_t at = j + __builtin_ctzll(better);
        best_[count_++] = {bits_of(w[at]), first_key + at};
      }
    }
  }

  // Writes the best, falling, and 0 and -1 where there are fewer.
  void finish(int64_t wanted, C* values, int64_t* keys) {
    keep(wanted);
    std::sort(best_, best_ + count_, Before());
    for (int64_t i = 0; i < wanted; ++i) {
      values[i] = 0;
      keys[i] = -1;
      if (i >= count_) continue;
      from_bits(best_[i].bits, values + i);
      if (values[i] > 0) keys[i] = best_[i].key;
    }
  }

 private:
  // Starts just below a weight that `wanted` of the first tile reach: the wanted-largest of its lanes' maxima. That
  // leaves a tenth of the tile to sort, and takes a fifth off the whole op.
  void raise(const C* w, int64_t width, int64_t wanted) {
    constexpr int W = Vec<C>::kWidth;
    if (wanted > W || width < 2 * W) return;
    Vec<C> highest = load(w);
    for (int64_t j = W; j < width; j += W) highest = max(highest, load(w + j));
    C lanes[W];
    store(lanes, highest);
    Candidate maxima[W];
    for (int lane = 0; lane < W; ++lane) maxima[lane] = {bits_of(lanes[lane]), lane};
    std::nth_element(maxima, maxima + wanted - 1, maxima + W, Before());
    const uint64_t reached = maxima[wanted - 1].bits;
    if (reached != 0) from_bits(reached - 1, &threshold_);
  }

  void keep(int64_t wanted) {
    if (count_ <= wanted) return;
    std::nth_element(best_, best_ + wanted - 1, best_ + count_, Before());
    count_ = wanted;
    from_bits(best_[wanted - 1].bits, &threshold_);
  }

  Candidate* best_;
  int64_t count_;
  bool nothing_seen_;
  C threshold_;  // once there are enough, only what is above it can be among the best; weights of 0 never are
};

template <typename C>
class Reduced {
 public:
  explicit Reduced(const AttentionWeightsReducedArgs& args) : args_(args), p_(args.problem), weights_(p_, args.lse) {
    slices_ = p_.batch * p_.num_heads_q;
    group_size_ = p_.num_heads_q / p_.num_heads_kv;
    tiles_ = ceil_div(p_.seq_len_k, kKeys);
  }

  void run() {
    switch (args_.reduction) {
      case WeightsReduction::kKeySum:
        return for_each(p_.batch * p_.num_heads_kv * tiles_, [&](int64_t task) { sum_queries(task); });
      case WeightsReduction::kEntropy:
        rows_ = kTaskRows;
        return for_each_rows([&](int64_t slice, Range rows) { entropy(slice, rows); });
      case WeightsReduction::kTopK: {
        // As many rows as keep their candidates in L2.
        constexpr int64_t kCandidates = (int64_t{1} << 20) / sizeof(Candidate);
        const int64_t rows = kCandidates / TopK<C>::capacity(args_.top_k) / kTileRows * kTileRows;
        rows_ = max(kTileRows, min(rows, kTaskRows));
        return for_each_rows([&](int64_t slice, Range rows) { top_k(slice, rows); });
      }
      case WeightsReduction::kPooled:
        cell_rows_ = min(args_.pool_size, p_.seq_len_q);
        cell_columns_ = min(args_.pool_size, p_.seq_len_k);
        rows_ = max(1, kTaskRows / cell_rows_) * cell_rows_;
        return for_each_rows([&](int64_t slice, Range rows) { pool(slice, rows); });
    }
  }

 private:
  static constexpr int64_t kRows = WeightTiles<C>::kRows, kKeys = WeightTiles<C>::kKeys;
  // Rows a task that goes along the keys: packing them costs it 2 % then, and 1,000 queries still feed 5 threads.
  static constexpr int64_t kTaskRows = 2 * kRows;

  // Working memory of a task: one tile.
  struct Tile {
    C* k;  // the packed keys
    C* q;  // [kRows, head_dim]
    C* s;  // [kRows, kKeys]
  };

  size_t tile_bytes() const {
    return static_cast<size_t>(weights_.keys_size() + weights_.queries_size() + kRows * kKeys) * sizeof(C) + 3 * 64;
  }

  Tile carve_tile(Carver& carver) const {
    Tile tile;
    tile.k = carver.take<C>(weights_.keys_size());
    tile.q = carver.take<C>(weights_.queries_size());
    tile.s = carver.take<C>(kRows * kKeys);
    return tile;
  }

  template <typename Body>
  void for_each(int64_t tasks, const Body& body) const {
    const double work = static_cast<double>(slices_) * static_cast<double>(p_.seq_len_q) *
                        static_cast<double>(p_.seq_len_k) * static_cast<double>(p_.head_dim);
    parallel_for(tasks, work, body);
  }

  template <typename Body>
  void for_each_rows(const Body& body) const {
    const int64_t blocks = ceil_div(p_.seq_len_q, rows_);
    for_each(slices_ * blocks, [&](int64_t task) {
      // Late blocks see more keys where the mask is causal: they go first.
      const int64_t first = (blocks - 1 - task / slices_) * rows_;
      body(task % slices_, Range{first, min(first + rows_, p_.seq_len_q)});
    });
  }

  // Goes along the tiles of keys that `rows` may see: consume(block, columns) gets blocks of the rows with their scores
  // in tile.s, and end(columns) is called after each tile.
  template <typename Consume, typename End>
  void along_keys(const Tile& tile, int64_t slice, Range rows, const Consume& consume, const End& end) const {
    const int64_t batch = slice / p_.num_heads_q, head = slice % p_.num_heads_q;
    const Range seen = Mask(p_, batch, head).k_range(rows.begin, rows.end);
    for (int64_t begin = seen.begin / kKeys * kKeys; begin < seen.end; begin += kKeys) {
      const Range columns{begin, min(begin + kKeys, seen.end)};
      weights_.pack(tile.k, batch, head / group_size_, columns);
      for (int64_t first = rows.begin; first < rows.end; first += kRows) {
        const Range block{first, min(first + kRows, rows.end)};
        if (weights_.score(tile.s, tile.q, tile.k, batch, head, block, columns)) consume(block, columns);
      }
      end(columns);
    }
  }

  void sum_queries(int64_t task) const {
    const int64_t kv = task / tiles_ % p_.num_heads_kv, batch = task / tiles_ / p_.num_heads_kv;
    const int64_t begin = task % tiles_ * kKeys, end = min(begin + kKeys, p_.seq_len_k);
    Carver carver(scratch(Scratch::kThread, tile_bytes() + kKeys * sizeof(double) + 64));
    const Tile tile = carve_tile(carver);
    double* sums = carver.take<double>(kKeys);
    // What lies beyond a batch entry's last visible key is never read.
    const Range columns{begin, min(end, Mask(p_, batch, 0).k_range(0, p_.seq_len_q).end)};
    if (columns.begin < columns.end) weights_.pack(tile.k, batch, kv, columns);
    for (int64_t head = kv * group_size_; head < (kv + 1) * group_size_; ++head) {
      zero(sums, kKeys);
      for (int64_t first = 0; first < p_.seq_len_q && columns.begin < columns.end; first += kRows) {
        const Range rows{first, min(first + kRows, p_.seq_len_q)};
        if (weights_.weigh(tile.s, tile.q, tile.k, batch, head, rows, columns)) {
          add_rows(sums, tile.s, rows.end - rows.begin, columns.end - columns.begin);
        }
      }
      write(sums, end - begin, (batch * p_.num_heads_q + head) * p_.seq_len_k + begin);
    }
  }

  void entropy(int64_t slice, Range rows) const {
    constexpr int W = Vec<C>::kWidth;
    const int64_t batch = slice / p_.num_heads_q, head = slice % p_.num_heads_q;
    Carver carver(
        scratch(Scratch::kThread, tile_bytes() + kRows * kKeys * sizeof(C) + rows_ * sizeof(double) + 2 * 64));
    const Tile tile = carve_tile(carver);
    C* weights = carver.take<C>(kRows * kKeys);
    double* sums = carver.take<double>(rows_);
    zero(sums, rows_);
    // The logarithm of a weight is its score's distance from the lse, here in powers of two. 0 times -inf is NaN, so
    // what has a weight of 0 gets a finite one.
    const Vec<C> lowest = Vec<C>::set1(C(-1e4));
    const double log2_rescale = __builtin_log2(p_.dropout.rescale);
    along_keys(
        tile, slice, rows,
        [&](Range block, Range columns) {
          weights_.exponentiate(weights, tile.s, batch, head, block, columns);
          for (int64_t i = block.begin; i < block.end; ++i) {
            const C *w = weights + (i - block.begin) * kKeys, *s = tile.s + (i - block.begin) * kKeys;
            const RowScale<C> scale = weights_.scale(batch, head, i);
            const Vec<C> shift = Vec<C>::set1(scale.shift);
            const Vec<C> rest =
                Vec<C>::set1(static_cast<C>(log2_rescale + __builtin_log2(static_cast<double>(scale.factor))));
            Vec<C> sum = Vec<C>::zero();
            for (int64_t j = 0; j < columns.end - columns.begin; j += W) {
              sum = fma(load(w + j), max(lowest, load(s + j) - shift + rest), sum);
            }
            sums[i - rows.begin] -= static_cast<double>(reduce_add(sum)) * kLn2;
          }
        },
        [](Range) {});
    write(sums, rows.end - rows.begin, slice * p_.seq_len_q + rows.begin);
  }

  void top_k(int64_t slice, Range rows) const {
    const int64_t batch = slice / p_.num_heads_q, head = slice % p_.num_heads_q, wanted = args_.top_k;
    const int64_t capacity = TopK<C>::capacity(wanted);
    Carver carver(scratch(Scratch::kThread, tile_bytes() + wanted * sizeof(C) + rows_ * sizeof(TopK<C>) +
                                                rows_ * capacity * sizeof(Candidate) + 3 * 64));
    const Tile tile = carve_tile(carver);
    C* values = carver.take<C>(wanted);
    TopK<C>* best = carver.take<TopK<C>>(rows_);
    Candidate* candidates = carver.take<Candidate>(rows_ * capacity);
    for (int64_t i = 0; i < rows_; ++i) best[i].start(candidates + i * capacity);
    along_keys(
        tile, slice, rows,
        [&](Range block, Range columns) {
          weights_.exponentiate(tile.s, tile.s, batch, head, block, columns);
          for (int64_t i = block.begin; i < block.end; ++i) {
            best[i - rows.begin].offer(tile.s + (i - block.begin) * kKeys, columns.end - columns.begin, columns.begin,
                                       wanted);
          }
        },
        [](Range) {});
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      const int64_t at = (slice * p_.seq_len_q + i) * wanted;
      best[i - rows.begin].finish(wanted, values, args_.keys + at);
      write(values, wanted, at);
    }
  }

  void pool(int64_t slice, Range rows) const {
    const int64_t batch = slice / p_.num_heads_q, head = slice % p_.num_heads_q;
    const int64_t cells_down = ceil_div(p_.seq_len_q, cell_rows_), cells_across = ceil_div(p_.seq_len_k, cell_columns_);
    const int64_t bands = ceil_div(rows.end - rows.begin, cell_rows_);
    const auto band_rows = [&](int64_t band) {
      const int64_t begin = rows.begin + band * cell_rows_;
      return Range{begin, min(begin + cell_rows_, rows.end)};
    };
    Carver carver(scratch(Scratch::kThread, tile_bytes() + ((bands + 1) * kKeys + bands) * sizeof(double) + 3 * 64));
    const Tile tile = carve_tile(carver);
    double* sums = carver.take<double>(bands * kKeys);  // of the columns of a tile, for each band of cells
    double* open = carver.take<double>(bands);          // of what the tiles before hold of a cell that reaches further
    double* cells = carver.take<double>(kKeys);
    zero(sums, bands * kKeys);
    zero(open, bands);
    const int64_t at = (slice * cells_down + rows.begin / cell_rows_) * cells_across;
    clear(at, bands * cells_across);  // invisible tiles are not visited
    along_keys(
        tile, slice, rows,
        [&](Range block, Range columns) {
          weights_.exponentiate(tile.s, tile.s, batch, head, block, columns);
          for (int64_t band = (block.begin - rows.begin) / cell_rows_; band < bands; ++band) {
            const Range all = band_rows(band), here{max(all.begin, block.begin), min(all.end, block.end)};
            if (here.begin >= here.end) break;
            add_rows(sums + band * kKeys, tile.s + (here.begin - block.begin) * kKeys, here.end - here.begin,
                     columns.end - columns.begin);
          }
        },
        [&](Range columns) {
          const int64_t first = columns.begin / cell_columns_, count = ceil_div(columns.end, cell_columns_) - first;
          for (int64_t band = 0; band < bands; ++band) {
            double* sum = sums + band * kKeys;
            const double height = static_cast<double>(band_rows(band).end - band_rows(band).begin);
            for (int64_t cell = 0; cell < count; ++cell) {
              const int64_t begin = (first + cell) * cell_columns_, end = min(begin + cell_columns_, p_.seq_len_k);
              double total = open[band];
              for (int64_t j = max(begin, columns.begin); j < min(end, columns.end); ++j) {
                total += sum[j - columns.begin];
              }
              cells[cell] = total / (height * static_cast<double>(end - begin));
              open[band] = end > columns.end ? total : 0;
            }
            // A cell that reaches further is written again with the next tile, if there is one.
            write(cells, count, at + band * cells_across + first);
            zero(sum, kKeys);
          }
        });
  }

  static void zero(double* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = 0;
  }

  // Writes `count` zeros to the result, from element `at` on.
  void clear(int64_t at, int64_t count) const {
    visit(p_.q.dtype, [&](auto type) {
      using T = typename decltype(type)::Type;
      __builtin_memset(static_cast<T*>(args_.out) + at, 0, static_cast<size_t>(count) * sizeof(T));
    });
  }

  // Rounds `count` values to the result, from element `at` on.
  template <typename V>
  void write(const V* from, int64_t count, int64_t at) const {
    visit(p_.q.dtype, [&](auto type) {
      using T = typename decltype(type)::Type;
      if constexpr (sizeof(Compute<T>) == sizeof(C)) {
        T* to = static_cast<T*>(args_.out) + at;
        for_each_vec<C>(count, [&](int64_t j, auto n) {
          C lanes[Vec<C>::kWidth] = {};
          for (int lane = 0; lane < n; ++lane) lanes[lane] = static_cast<C>(from[j + lane]);
          store_n(to + j, load(lanes), n);
        });
      }
    });
  }

  // sums[j] += sum over i of w[i][j], eight rows in C before they are widened.
  static void add_rows(double* sums, const C* w, int64_t height, int64_t width) {
    constexpr int W = Vec<C>::kWidth, V = W / Vec<double>::kWidth;
    for (int64_t j = 0; j < width; j += W) {
      Vec<double> total[V];
      for (int v = 0; v < V; ++v) total[v] = load(sums + j + v * Vec<double>::kWidth);
      for (int64_t first = 0; first < height; first += 8) {
        Vec<C> sum = load(w + first * kKeys + j);
        for (int64_t i = first + 1; i < min(first + 8, height); ++i) sum = sum + load(w + i * kKeys + j);
        C lanes[W];
        store(lanes, sum);
        for (int v = 0; v < V; ++v) total[v] = total[v] + load_as<double>(lanes + v * Vec<double>::kWidth);
      }
      for (int v = 0; v < V; ++v) store(sums + j + v * Vec<double>::kWidth, total[v]);
    }
  }

  const AttentionWeightsReducedArgs& args_;
  const AttentionProblem& p_;
  const WeightTiles<C> weights_;
  int64_t slices_, group_size_, tiles_;
  int64_t rows_ = 0;                          // of a task that goes along the keys
  int64_t cell_rows_ = 0, cell_columns_ = 0;  // for kPooled
};

}  // namespace

void attention_weights_reduced(const AttentionWeightsReducedArgs& args) {
  if (args.problem.q.dtype == DType::kFloat64) {
    Reduced<double>(args).run();
  } else {
    Reduced<float>(args).run();
  }
}

}  // namespace fastattn::FASTATTN_ISA
