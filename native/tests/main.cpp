#include <cstdio>
#include <cstring>
#include <exception>

#include "check.hpp"

namespace ckpt::test {

std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}

}  // namespace ckpt::test

// Runs the tests whose names contain the argument, or all of them.
int main(int argc, char** argv) {
    int failures = 0;
    int run = 0;
    for (const auto& test : ckpt::test::tests()) {
        if (argc > 1 && std::strstr(test.name.c_str(), argv[1]) == nullptr) {
            continue;
        }
        ++run;
        try {
            test.body();
            std::printf("ok      %s\n", test.name.c_str());
        } catch (const std::exception& error) {
            ++failures;
            std::printf("FAILED  %s: %s\n", test.name.c_str(), error.what());
        }
        std::fflush(stdout);
    }
    std::printf("%d tests, %d failed\n", run, failures);
    return failures == 0 && run > 0 ? 0 : 1;
}
