// Runs one broken kernel (broken.cpp) and returns its cudaError_t, or -1 if there is none of this name.
#pragma once
#include <string>

int run_broken(const std::string& name);
