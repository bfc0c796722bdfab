// The test program; tests/test_simt.py runs it.
//   list                   names of all cases
//   check SEEDS NAME...    every case under SEEDS schedules; fails unless all are right
//   mutate SEEDS NAME...   leaves out one barrier at a time: in how many of SEEDS schedules is it noticed?
//   broken NAME            runs a kernel that is wrong
#include <sys/wait.h>
#include <unistd.h>

#include <stdexcept>

#include "broken.h"
#include "testing.h"

namespace {

testing::Run make(const std::string& name) {
  for (const testing::Case& c : testing::cases())
    if (c.name == name) return c.make();
  throw std::runtime_error("no case " + name);
}

std::string run(const testing::Run& f, uint64_t seed) {
  simt::options.seed = seed;
  try {
    return f();
  } catch (const std::exception& error) {
    return error.what();
  }
}

int check(int seeds, const std::string& name) {
  const testing::Run f = make(name);
  for (int seed = 0; seed < seeds; ++seed)
    if (const std::string wrong = run(f, seed); !wrong.empty()) {
      std::printf("%s, seed %d: %s\n", name.c_str(), seed, wrong.c_str());
      return 1;
    }
  return 0;
}

void mutate(int seeds, const std::string& name) {
  const testing::Run f = make(name);
  simt::barriers_seen.clear();
  run(f, 0);
  for (const simt::Site& site : std::vector<simt::Site>(simt::barriers_seen)) {
    int noticed = 0;
    for (int seed = 0; seed < seeds; ++seed) {
      std::fflush(nullptr);
      const pid_t child = fork();  // a mutant may crash, or run for ever
      if (child == 0) {
        alarm(60);
        if (!std::freopen("/dev/null", "w", stderr)) _exit(0);
        simt::options.skip = site;
        _exit(run(f, seed).empty() ? 0 : 1);
      }
      int status = 0;
      waitpid(child, &status, 0);
      noticed += status != 0;
    }
    const std::string path = site.file;
    std::printf("%s:%d %d\n", path.substr(path.rfind('/') + 1).c_str(), site.line, noticed);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> words(argv + 1, argv + argc);
  const std::string command = words.empty() ? "" : words[0];
  if (command == "list") {
    for (const testing::Case& c : testing::cases()) std::puts(c.name);
    return 0;
  }
  if (command == "broken" && words.size() == 2) {
    try {
      std::printf("returned %d\n", run_broken(words[1]));
      return 0;
    } catch (const std::exception& error) {
      std::printf("%s\n", error.what());
      std::fflush(nullptr);
      _exit(3);  // its fibers are not taken down
    }
  }
  int failed = 0;
  for (size_t i = 2; i < words.size(); ++i) {
    if (command == "check") failed |= check(std::stoi(words[1]), words[i]);
    if (command == "mutate") mutate(std::stoi(words[1]), words[i]);
  }
  return failed;
}
