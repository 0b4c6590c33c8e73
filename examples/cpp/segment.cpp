// Segments a photo with an AOTInductor package, in C++ with libtorch alone.
//
// groupvit export demo exported --to aoti --parts segment --preprocess --labels "red, green, blue" \
//   --background-labels "grass"
// cmake -S examples/cpp -B build -DTORCH_DIR=$(python -c "import torch; print(torch.__path__[0])")
// cmake --build build
// build/segment exported/segmenter.pt2 photo.ppm labels.pgm
//
// photo.ppm is binary PPM (P6), which most image programs write; labels.pgm is binary PGM (P5) of the photo's size, whose
// values are places in the list of labels that the package holds and export_report.json shows.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdint>
#include <fstream>
#include <iostream>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

// The next whole number in a PPM's header, in which # begins a comment.
int64_t header_number(std::istream& file, const std::string& path) {
  while (file >> std::ws && file.peek() == '#') {
    file.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
  }
  int64_t value = 0;
  if (!(file >> value) || value < 1 || value > 65535) {
    throw std::runtime_error(path + " has no width, height and largest value, each from 1 to 65535, in its header");
  }
  return value;
}

// An image [1, H, W, 3], uint8.
at::Tensor read_ppm(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string kind(2, ' ');
  if (!file.read(kind.data(), 2) || kind != "P6") {
    throw std::runtime_error(path + " is not a binary PPM, which begins with P6");
  }
  const int64_t width = header_number(file, path), height = header_number(file, path);
  if (header_number(file, path) != 255) {
    throw std::runtime_error(path + " must have 8 bits for each value: the largest value in its header must be 255");
  }
  file.get();
  at::Tensor image = at::empty({1, height, width, 3}, at::kByte);
  file.read(reinterpret_cast<char*>(image.data_ptr<uint8_t>()), image.numel());
  if (file.gcount() != image.numel()) {
    throw std::runtime_error(path + " is cut off");
  }
  return image;
}

// A label map [H, W] as PGM, of two bytes a value, the higher one first, where there are more than 256 labels.
void write_pgm(const std::string& path, const at::Tensor& labels) {
  const at::Tensor values = labels.to(at::kInt).contiguous();
  const bool wide = values.max().item<int>() > 255;
  std::vector<char> bytes;
  for (const int* value = values.data_ptr<int>(); value != values.data_ptr<int>() + values.numel(); ++value) {
    if (wide) bytes.push_back(static_cast<char>(*value >> 8));
    bytes.push_back(static_cast<char>(*value & 255));
  }
  std::ofstream file(path, std::ios::binary);
  file << "P5\n" << values.size(1) << " " << values.size(0) << "\n" << (wide ? 65535 : 255) << "\n";
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!file.flush()) {
    throw std::runtime_error(path + " cannot be written");
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: segment PACKAGE PHOTO.ppm LABELS.pgm\n";
    return 2;
  }
  try {
    const c10::InferenceMode inference;
    torch::inductor::AOTIModelPackageLoader package(argv[1]);
    const std::string about = package.get_metadata()["groupvit"];
    if (about.find("\"images\": \"uint8") == std::string::npos || about.find("text_embeds") != std::string::npos) {
      throw std::runtime_error(std::string(argv[1]) + " must take images alone: export it with --preprocess and --labels");
    }
    const at::Tensor image = read_ppm(argv[2]);
    // label_map, scores, group_map.
    const at::Tensor labels = package.run({image})[0][0];
    write_pgm(argv[3], labels);
    const at::Tensor counts = at::bincount(labels.flatten());
    for (int64_t value = 0; value < counts.size(0); ++value) {
      std::cout << value << ": " << 100.0 * counts[value].item<int64_t>() / labels.numel() << "%\n";
    }
  } catch (const std::exception& error) {
    std::cerr << "error: " << std::string(error.what()).substr(0, 500) << "\n";
    return 1;
  }
  return 0;
}
