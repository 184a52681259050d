// Attention of one new position of every sequence to a cache of keys and values, on a CPU.
//
// It is compiled for one head width (HEAD_WIDTH, a multiple of 32) and one type of the cache (HALF for bfloat16). Sums
// are taken in float32. Vectors are as long as the processor's: longer ones would pass through memory.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512F__
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
constexpr int LANES = 16;
#else
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
constexpr int LANES = 8;
#endif
constexpr int PAIRS = HEAD_WIDTH / (2 * LANES), LINE_BYTES = 64;
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
struct Pair { floats first, second; };

// A row is read in pairs of vectors. Of bfloat16 the first holds the numbers at even places and the second those at odd
// ones: both are then a single operation away from float32. `place` says where a lane of a vector lies in its row.
#ifdef HALF
typedef uint16_t number;
static inline Pair load(const number *row, int pair) {
    ints raw;
    memcpy(&raw, row + 2 * LANES * pair, sizeof raw);
    return {(floats)(raw << 16), (floats)(raw & (int32_t)0xffff0000)};
}
static inline int place(int pair, int vector, int lane) { return 2 * (LANES * pair + lane) + vector; }
#else
typedef float number;
static inline Pair load(const number *row, int pair) {
    Pair found;
    memcpy(&found, row + 2 * LANES * pair, sizeof found);
    return found;
}
static inline int place(int pair, int vector, int lane) { return LANES * (2 * pair + vector) + lane; }
#endif

// Asks for row `t` of what is read next: memory answers late, and the rows of the next head lie elsewhere.
static inline void expect(const number *rows, int64_t t) {
    for (int at = 0; at < HEAD_WIDTH; at += LINE_BYTES / (int)sizeof(number)) __builtin_prefetch(rows + t * HEAD_WIDTH + at);
}

static inline float sum(floats x) {
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += x[lane];
    return total;
}

// Sums of LANES vectors, one in each lane: neighbours are added again and again, each time in half as many vectors.
static inline floats sums(floats *x) {
    for (int num = LANES; num > 1; num /= 2)
        for (int i = 0; i < num / 2; i++)
            x[i] = __builtin_shufflevector(x[2 * i], x[2 * i + 1], EVEN)
                   + __builtin_shufflevector(x[2 * i], x[2 * i + 1], ODD);
    return x[0];
}

// exp of numbers up to 0: 2^whole times a polynomial of the rest (Cephes, expf), to about a rounding.
static inline floats exponential(floats x) {
    x = x < -87.0f ? floats{} - 87.0f : x;
    ints whole = __builtin_convertvector(x * 1.44269504f - 0.5f, ints);
    floats rounded = __builtin_convertvector(whole, floats);
    x = x - rounded * 0.693359375f + rounded * 2.12194440e-4f;
    floats y = ((((1.9875691500e-4f * x + 1.3981999507e-3f) * x + 8.3334519073e-3f) * x + 4.1665795894e-2f) * x
                + 1.6666665459e-1f) * x + 5.0000001201e-1f;
    return (y * x * x + x + 1.0f) * (floats)((whole + 127) << 23);
}

// Turns scores into shares that are not divided by their sum yet, which is returned; the last vector is filled up.
static float shares(float *scores, float most, int64_t num) {
    for (int64_t t = num; t % LANES; t++) scores[t] = -INFINITY;
    floats total = {};
    for (int64_t t = 0; t < num; t += LANES) {
        floats score;
        memcpy(&score, scores + t, sizeof score);
        score = score == -INFINITY ? floats{} : exponential(score - most);
        memcpy(scores + t, &score, sizeof score);
        total += score;
    }
    return sum(total);
}

// The products of a query and row `t` of the keys, lane by lane.
static inline floats products(const Pair *query, const number *keys, const number *values, int64_t t) {
    expect(values, t);
    floats product = {};
    for (int p = 0; p < PAIRS; p++) {
        Pair key = load(keys + t * HEAD_WIDTH, p);
        product += query[p].first * key.first + query[p].second * key.second;
    }
    return product;
}

// Adds row `t` of the values, times its share.
static inline void add(Pair *mixed, const number *values, const number *next_keys, int64_t t, float share) {
    expect(next_keys, t);
    for (int p = 0; p < PAIRS; p++) {
        Pair value = load(values + t * HEAD_WIDTH, p);
        mixed[p].first += share * value.first;
        mixed[p].second += share * value.second;
    }
}

// One head: a query (HEAD_WIDTH) that is scaled already, keys and values (num, HEAD_WIDTH).
static void attend_head(const float *query, const number *keys, const number *values, const number *next_keys, float *out,
                        float *scores, int64_t num) {
    Pair q[PAIRS], even[PAIRS] = {}, odd[PAIRS] = {};
    for (int p = 0; p < PAIRS; p++)
        for (int lane = 0; lane < LANES; lane++) {
            q[p].first[lane] = query[place(p, 0, lane)];
            q[p].second[lane] = query[place(p, 1, lane)];
        }
    floats most_of_lane = floats{} - INFINITY;
    int64_t done = 0;
    for (; done + LANES <= num; done += LANES) {
        floats product[LANES];
        for (int row = 0; row < LANES; row++) product[row] = products(q, keys, values, done + row);
        floats score = sums(product);
        memcpy(scores + done, &score, sizeof score);
        most_of_lane = score > most_of_lane ? score : most_of_lane;
    }
    float most = -INFINITY;
    for (int lane = 0; lane < LANES; lane++) most = most_of_lane[lane] > most ? most_of_lane[lane] : most;
    for (; done < num; done++) {
        scores[done] = sum(products(q, keys, values, done));
        most = scores[done] > most ? scores[done] : most;
    }
    float scale = 1.0f / shares(scores, most, num);
    // Two sums, so that the processor need not wait for one addition before it begins the next.
    int64_t t = 0;
    for (; t + 1 < num; t += 2) {
        add(even, values, next_keys, t, scores[t]);
        add(odd, values, next_keys, t + 1, scores[t + 1]);
    }
    if (t < num) add(even, values, next_keys, t, scores[t]);
    for (int p = 0; p < PAIRS; p++)
        for (int lane = 0; lane < LANES; lane++) {
            out[place(p, 0, lane)] = (even[p].first[lane] + odd[p].first[lane]) * scale;
            out[place(p, 1, lane)] = (even[p].second[lane] + odd[p].second[lane]) * scale;
        }
}

// Queries and results are (num_rows, num_shared, HEAD_WIDTH); row r of keys and values begins at r * row_stride.
extern "C" void attend(const float *queries, const number *keys, const number *values, float *out, int64_t num_rows,
                       int64_t num_shared, int64_t num, int64_t row_stride, int32_t num_threads) {
#pragma omp parallel num_threads(num_threads)
    {
        std::vector<float> scores((num + LANES - 1) / LANES * LANES);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < num_rows; row++) {
            int64_t next = (row + 1 < num_rows ? row + 1 : row) * row_stride;
            for (int64_t head = row * num_shared; head < (row + 1) * num_shared; head++)
                attend_head(queries + head * HEAD_WIDTH, keys + row * row_stride, values + row * row_stride,
                            keys + next, out + head * HEAD_WIDTH, scores.data(), num);
        }
    }
}
