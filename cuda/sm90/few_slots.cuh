// The plan of a layer with few slots, which every block makes for itself in shared memory: a launch before and reads
// that depend on one another would take longer than all of it.  It is the plan that route() makes.  What a block then
// does, it also finds there: divisions in the threads that begin with it would hold up the first words.
#pragma once
#include "../grouped.cuh"
#include "ptx_sm90.cuh"
#include "schedule.cuh"

// What is dealt of gate and up, and a block's share.
struct Deal {
  int cut = 0, dealers = 1;
  Share share;
};

struct FewSlots {
  static constexpr int kStart = 1024;   // where the driver's own kilobyte ends
  static constexpr int kThreads = 128;  // of the warpgroup that copies, one for each slot
  static_assert(kFewSlots <= kThreads);

  // Addresses in shared memory.
  static constexpr uint32_t kExperts = kStart;                      // local, of slots
  static constexpr uint32_t kUnitGroups = kExperts + 4 * kThreads;  // of the unit that begins at a row, else 0
  static constexpr uint32_t kSortedSlots = kUnitGroups + 4 * kThreads;
  static constexpr uint32_t kGroupCounts = kSortedSlots + 4 * kThreads;
  static constexpr uint32_t kGroups = kGroupCounts + sizeof(TokenGroup);
  static constexpr uint32_t kDeal = kGroups + kThreads * sizeof(TokenGroup);
  static constexpr int kBytes = 6 * 1024;  // stages follow, at a multiple of 1024
  static_assert(kDeal + 32 <= kStart + kBytes);

  __device__ static Plan plan() {
    return {shared_pointer<int>(kGroupCounts), shared_pointer<TokenGroup>(kGroups), shared_pointer<int>(kSortedSlots)};
  }

  __device__ static Deal deal() {
    const uint4 low = load_shared_16(kDeal), high = load_shared_16(kDeal + 16);
    Deal deal;
    deal.cut = low.x, deal.dealers = low.y, deal.share.rest_first = low.z, deal.share.rest_end = low.w;
    deal.share.dealt = high.x, deal.share.dealt_end = high.y, deal.share.start = high.z;
    return deal;
  }
  __device__ static void store(const Deal& deal) {
    const Share& share = deal.share;
    store_shared_16(kDeal, make_uint4(deal.cut, deal.dealers, share.rest_first, share.rest_end));
    store_shared_16(kDeal + 16, make_uint4(share.dealt, share.dealt_end, share.start, 0));
  }

  // Local expert of the slot of a warpgroup's thread, or -1.
  __device__ static int own_expert(const Choices& choices) {
    const int slot = threadIdx.x % kThreads;
    return slot < choices.slots ? choices.local_expert(slot) : -1;
  }

  // By a warpgroup, whose barrier is kBarrier.  expert: own_expert(); of_as_many: the deal of gate and up that have as
  // many groups as this thread's number, and one more.  It waits for nobody after its last stores.
  template <int kPartTokens, int kBarrier>
  __device__ __forceinline__ static void make(const Choices& choices, int expert, const Deal& of_as_many) {
    const int slot = threadIdx.x % kThreads;
    store_shared_4(kExperts + 4 * slot, expert);
    store_shared_4(kUnitGroups + 4 * slot, 0);
    warpgroup_barrier(kBarrier);

    const bool paired = expert < 2 * choices.pairs, second = paired && expert % 2 == 1;
    const int partner = paired ? expert ^ 1 : -2;
    // Slots: of experts before, of the same one, of those before this, of the partner, of all pairs.
    int lower = 0, own = 0, earlier = 0, partners = 0, of_pairs = 0;
#pragma unroll 2
    for (int first = 0; first < choices.slots; first += 4) {
      const uint4 four = load_shared_16(kExperts + 4 * first);
      const uint32_t others[4] = {four.x, four.y, four.z, four.w};  // -1 is larger than any
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        lower += others[i] < uint32_t(expert);
        own += others[i] == uint32_t(expert);
        earlier += others[i] == uint32_t(expert) && first + i < slot;
        partners += others[i] == uint32_t(partner);
        of_pairs += others[i] < uint32_t(2 * choices.pairs);
      }
    }
    if (expert >= 0) store_shared_4(kSortedSlots + 4 * (lower + earlier), slot);
    const bool leads = expert >= 0 && earlier == 0 && !(second && partners > 0);
    const UnitRows rows{paired ? expert / 2 : expert - choices.pairs, lower, second ? 0 : own, second ? own : partners,
                        kPartTokens};
    if (leads) store_shared_4(kUnitGroups + 4 * lower, rows.groups());
    warpgroup_barrier(kBarrier);

    int before = 0, pair_groups = 0, groups = 0;
#pragma unroll 2
    for (int first = 0; first < choices.slots; first += 4) {
      const uint4 four = load_shared_16(kUnitGroups + 4 * first);
      const int units[4] = {int(four.x), int(four.y), int(four.z), int(four.w)};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        before += first + i < lower ? units[i] : 0;
        pair_groups += first + i < of_pairs ? units[i] : 0;
        groups += units[i];
      }
    }
    if (slot == 0) store_shared_8(kGroupCounts, pair_groups, groups);
    if (groups == slot + 1) store(of_as_many);
    if (groups == 0 && slot == 0) store(Deal());
    for (int g = 0; leads && g < rows.groups(); ++g) {
      const TokenGroup group = rows.group(before, g);
      const uint32_t place = kGroups + (before + g) * sizeof(TokenGroup);
      store_shared_16(place, make_uint4(group.unit, group.first, group.unit_groups, group.positions));
      store_shared_16(place + 16, make_uint4(group.start[0], group.start[1], group.count[0], group.count[1]));
    }
  }
};
