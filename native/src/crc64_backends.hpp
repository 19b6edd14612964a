// The backends that a build contains; which of them run is decided in crc64.cpp.
#pragma once

#include "crc64.hpp"

namespace ckpt {

extern const CrcBackend kTableCrc;
#if defined(CKPT_HAVE_CLMUL)
extern const CrcBackend kClmulCrc;
#endif
#if defined(CKPT_HAVE_VPCLMUL)
extern const CrcBackend kVpclmulCrc;
#endif
#if defined(CKPT_HAVE_VPCLMUL256)
extern const CrcBackend kVpclmul256Crc;
#endif

}  // namespace ckpt
