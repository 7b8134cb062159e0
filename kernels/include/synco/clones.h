// Functions that are compiled once for each instruction set worth having; the best is chosen when the library is loaded.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define SYNCO_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SYNCO_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))  // g++ before 12 knows no levels
#else
#define SYNCO_CLONES
#endif
// What a clone calls: left alone, it would be compiled for the default instruction set only.
#define SYNCO_INLINE inline __attribute__((always_inline))
