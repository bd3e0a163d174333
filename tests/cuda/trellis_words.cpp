// Decodes tiles on the host with cuda/trellis_words.cuh, built with host_gpu.h in place of the headers that hold
// instructions.  Built and run by test_trellis_words.py: of a word's bits, an even number of tiles and these tiles on the
// standard input, the registers of every tile and lane on the standard output: those of position 0, of position 1, and of
// both.
#include "host_gpu.h"
#include "trellis_words.cuh"

namespace {

template <int kBits>
void decode(int count) {
  using Code = TrellisWords<kBits>;
  Block own;
  block = &own;
  for (int tile = 0; tile < count; ++tile) {
    // An even tile and the odd one after it have what comes before either's words.
    const bool odd = tile % 2;
    uint8_t* both = shared_bytes(kShared, 2 * Code::kTileBytes);
    if (!odd && fread(both, Code::kTileBytes, 2, stdin) != 2) fail("there are fewer tiles");
    for (int lane = 0; lane < 32; ++lane) {
      uint32_t out[16], none[4];
      uint32_t (&first)[4] = reinterpret_cast<uint32_t (&)[4]>(out[0]);
      uint32_t (&second)[4] = reinterpret_cast<uint32_t (&)[4]>(out[4]);
      uint32_t (&both0)[4] = reinterpret_cast<uint32_t (&)[4]>(out[8]);
      uint32_t (&both1)[4] = reinterpret_cast<uint32_t (&)[4]>(out[12]);
      const auto entries = Code::look_up(Code::load(kShared + odd * Code::kTileBytes, lane, odd));
      Code(false, 0, 0, 0).template take_apart<false>(entries, first, none);
      Code(false, 1, 1, 0).template take_apart<false>(entries, second, none);
      Code(false, 0, 1, 0).template take_apart<true>(entries, both0, both1);
      fwrite(out, sizeof out, 1, stdout);
    }
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
