// Decodes tiles on the host with cuda/trellis_words.cuh, whose instructions it stands in for.
// Built and run by test_trellis_words.py: of a word's bits, a number of tiles and these tiles on the standard input, the
// registers of every tile and lane on the standard output: those of position 0, of position 1, and of both.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __device__

namespace {

struct uint2 {
  uint32_t x, y;
};
struct __nv_bfloat162 {
  uint32_t bits;
};

std::vector<uint8_t> tiles;  // shared memory

template <class Value>
Value load(uint32_t at) {
  if (at % sizeof(Value) || at + sizeof(Value) > tiles.size()) abort();
  Value value;
  memcpy(&value, &tiles[at], sizeof value);
  return value;
}
uint2 load_shared_8(uint32_t at) { return load<uint2>(at); }
uint32_t load_shared_4(uint32_t at) { return load<uint32_t>(at); }
uint32_t load_shared_2(uint32_t at) { return load<uint16_t>(at); }
uint32_t load_shared_1(uint32_t at) { return load<uint8_t>(at); }

uint32_t dot_bytes(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 32; i += 8) c += int(a >> i & 255) * int8_t(b >> i);
  return c;
}
uint32_t shifted_left(uint32_t value, int bits) { return value << bits; }
uint32_t and_xor(uint32_t value, uint32_t mask, uint32_t turned) { return (value & mask) ^ turned; }
uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t byte = selector >> 4 * i & 15;
    if (byte > 7) abort();
    result |= uint32_t(both >> 8 * byte & 255) << 8 * i;
  }
  return result;
}
uint32_t __funnelshift_l(uint32_t low, uint32_t high, int bits) {
  return uint32_t((uint64_t(high) << 32 | low) << bits >> 32);
}

float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (bits & 0xFFFF) abort();  // no bf16
  return bits >> 16;
}
__nv_bfloat162 as_bf16x2(uint32_t bits) { return {bits}; }
__nv_bfloat162 __float2bfloat162_rn(float value) { return {as_bits(value) << 16 | as_bits(value)}; }
__nv_bfloat162 __hadd2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {as_bits(as_float(a.bits << 16) + as_float(b.bits << 16)) |
          as_bits(as_float(a.bits & 0xFFFF0000) + as_float(b.bits & 0xFFFF0000)) << 16};
}

#include "trellis_words.cuh"

template <int kBits>
void decode(int count) {
  using Code = TrellisWords<kBits>;
  tiles.resize(size_t(count) * 32 * kBits);
  if (fread(tiles.data(), 1, tiles.size(), stdin) != tiles.size()) abort();
  for (int tile = 0; tile < count; ++tile)
    for (int lane = 0; lane < 32; ++lane) {
      uint32_t out[16], none[4];
      uint32_t (&first)[4] = reinterpret_cast<uint32_t (&)[4]>(out[0]);
      uint32_t (&second)[4] = reinterpret_cast<uint32_t (&)[4]>(out[4]);
      uint32_t (&both0)[4] = reinterpret_cast<uint32_t (&)[4]>(out[8]);
      uint32_t (&both1)[4] = reinterpret_cast<uint32_t (&)[4]>(out[12]);
      const auto entries = Code::look_up(Code::load(tile * Code::kTileBytes, lane, tile % 2));
      Code(false, 0, 0, 0).template take_apart<false>(entries, first, none);
      Code(false, 1, 1, 0).template take_apart<false>(entries, second, none);
      Code(false, 0, 1, 0).template take_apart<true>(entries, both0, both1);
      fwrite(out, sizeof out, 1, stdout);
    }
}

}  // namespace

int main(int, char** arguments) {
  const int count = atoi(arguments[2]);
  switch (atoi(arguments[1])) {
    case 8: decode<8>(count); return 0;
    case 6: decode<6>(count); return 0;
    case 5: decode<5>(count); return 0;
    case 4: decode<4>(count); return 0;
    case 3: decode<3>(count); return 0;
  }
  return 1;
}
