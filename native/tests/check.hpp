// A test is a function that throws; main() runs them all by name.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace ckpt::test {

struct Test {
    std::string name;
    std::function<void()> body;
};

std::vector<Test>& tests();

struct Registration {
    Registration(const char* name, std::function<void()> body) { tests().push_back({name, std::move(body)}); }
};

#define CKPT_TEST(name)                                        \
    static void name();                                        \
    static const ::ckpt::test::Registration name##_(#name, name); \
    static void name()

template <typename A, typename B>
void expect_equal(const A& a, const B& b, const char* what, int line) {
    if (!(a == b)) {
        std::ostringstream message;
        message << "line " << line << ": " << what << ": " << a << " is not " << b;
        throw std::runtime_error(message.str());
    }
}

#define EXPECT_EQ(a, b) ::ckpt::test::expect_equal((a), (b), #a " == " #b, __LINE__)
#define EXPECT(condition)                                                                                  \
    do {                                                                                                   \
        if (!(condition)) {                                                                                \
            throw std::runtime_error("line " + std::to_string(__LINE__) + ": not so: " #condition);       \
        }                                                                                                  \
    } while (false)
#define EXPECT_THROWS(type, statement)                                                                     \
    do {                                                                                                   \
        bool thrown = false;                                                                               \
        try {                                                                                              \
            statement;                                                                                     \
        } catch (const type&) {                                                                            \
            thrown = true;                                                                                 \
        }                                                                                                  \
        if (!thrown) {                                                                                     \
            throw std::runtime_error("line " + std::to_string(__LINE__) + ": did not throw " #type);       \
        }                                                                                                  \
    } while (false)

using Random = std::mt19937_64;

inline std::uint64_t below(Random& random, std::uint64_t limit) { return random() % limit; }

inline std::vector<std::uint8_t> random_bytes(Random& random, std::size_t size) {
    std::vector<std::uint8_t> bytes(size);
    for (auto& byte : bytes) {
        byte = static_cast<std::uint8_t>(random());
    }
    return bytes;
}

// One bit at a time, straight from the definition.
inline std::uint64_t slow_crc(const std::uint8_t* data, std::size_t size, std::uint64_t crc = 0) {
    for (std::size_t i = 0; i < size; ++i) {
        crc ^= data[i];
        for (int bit = 0; bit < 8; ++bit) {
            crc = (crc >> 1) ^ ((crc & 1) != 0 ? 0x9A6C9329AC4BC9B5ull : 0);
        }
    }
    return crc;
}

}  // namespace ckpt::test
