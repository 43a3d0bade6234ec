#include "record.h"

#include <cmath>
#include <cstdlib>
#include <functional>
#include <sstream>

namespace infinirt_cpu {

namespace {

const char *const DTYPE_NAMES[] = {"invalid", "byte", "bool", "i8", "i16", "i32", "i64", "u8", "u16", "u32",
                                   "u64", "f8", "f16", "f32", "f64", "c16", "c32", "c64", "c128", "bf16"};

using Words = std::vector<std::string>;

// A value that is not what it should be; the message says what was expected.
struct Malformed {
    std::string message;
};

Words split(const std::string &text, char separator) {
    Words words;
    std::istringstream stream(text);
    for (std::string word; std::getline(stream, word, separator);) {
        if (!word.empty()) {
            words.push_back(word);
        }
    }
    return words;
}

size_t readNumber(const std::string &text) {
    if (text.empty() || text.size() > 15 || text.find_first_not_of("0123456789") != std::string::npos) {
        throw Malformed{"'" + text + "' is no whole number"};
    }
    return size_t(std::strtoull(text.c_str(), nullptr, 10));
}

bool readFlag(const std::string &text) {
    if (text != "0" && text != "1") {
        throw Malformed{"'" + text + "' is neither 0 nor 1"};
    }
    return text == "1";
}

infiniDtype_t readDtype(const std::string &text) {
    for (int i = INFINI_DTYPE_BYTE; i <= INFINI_DTYPE_BF16; ++i) {
        if (text == DTYPE_NAMES[i]) {
            return infiniDtype_t(i);
        }
    }
    throw Malformed{"'" + text + "' is no dtype"};
}

float readFloat(const std::string &text) {
    char *end = nullptr;
    const float value = std::strtof(text.c_str(), &end);
    if (text.empty() || *end != '\0' || !std::isfinite(value)) {
        throw Malformed{"'" + text + "' is no number"};
    }
    return value;
}

std::pair<float, float> readPair(const std::string &text) {
    const size_t colon = text.find(':');
    if (colon == std::string::npos) {
        throw Malformed{"'" + text + "' is no pair ALPHA:BETA"};
    }
    return {readFloat(text.substr(0, colon)), readFloat(text.substr(colon + 1))};
}

template <class T, T (*READ)(const std::string &)>
void readList(std::vector<T> *values, const std::string &text) {
    values->clear();
    for (const std::string &word : split(text, ',')) {
        values->push_back(READ(word));
    }
}

constexpr auto readDtypes = readList<infiniDtype_t, readDtype>;
constexpr auto readNumbers = readList<size_t, readNumber>;

using Setter = std::function<void(OpRecord &, const std::string &)>;

const std::map<std::string, Setter> &opKeys() {
    static const std::map<std::string, Setter> keys = {
        {"dtypes", [](OpRecord &op, const std::string &text) { readDtypes(&op.dtypes, text); }},
        {"index_dtypes", [](OpRecord &op, const std::string &text) { readDtypes(&op.index_dtypes, text); }},
        {"head_dims", [](OpRecord &op, const std::string &text) { readNumbers(&op.head_dims, text); }},
        {"uncertain", [](OpRecord &op, const std::string &text) { op.uncertain = readFlag(text); }},
        {"graph_capture", [](OpRecord &op, const std::string &text) { op.graph_capture = readFlag(text); }},
        {"ranks", [](OpRecord &op, const std::string &text) { readNumbers(&op.ranks, text); }},
        {"last_multiple", [](OpRecord &op, const std::string &text) { op.last_multiple = readNumber(text); }},
        {"row_major_output", [](OpRecord &op, const std::string &text) { op.row_major_output = readFlag(text); }},
        {"single_batch_dtypes", [](OpRecord &op, const std::string &text) { readDtypes(&op.single_batch_dtypes, text); }},
        {"alphas", [](OpRecord &op, const std::string &text) { readList<std::pair<float, float>, readPair>(&op.alphas, text); }},
        {"unit_last_stride", [](OpRecord &op, const std::string &text) { readNumbers(&op.unit_last_stride, text); }},
        {"packed_heads", [](OpRecord &op, const std::string &text) { readNumbers(&op.packed_heads, text); }},
        {"contiguous", [](OpRecord &op, const std::string &text) { readNumbers(&op.contiguous, text); }},
        {"max_row_bytes", [](OpRecord &op, const std::string &text) { op.max_row_bytes = readNumber(text); }},
        {"clobbers", [](OpRecord &op, const std::string &text) { readNumbers(&op.clobbers, text); }},
    };
    return keys;
}

void readOp(const Words &words, Record *record) {
    if (words.size() < 2) {
        throw Malformed{"an op needs a name"};
    }
    OpRecord op;
    for (size_t i = 2; i < words.size(); ++i) {
        const size_t equals = words[i].find('=');
        const auto key = opKeys().find(words[i].substr(0, equals));
        if (equals == std::string::npos || key == opKeys().end()) {
            throw Malformed{"unknown field '" + words[i] + "' of op " + words[1]};
        }
        key->second(op, words[i].substr(equals + 1));
    }
    if (op.dtypes.empty()) {
        throw Malformed{"op " + words[1] + " has no dtypes"};
    }
    if (!record->ops.emplace(words[1], op).second) {
        throw Malformed{"op " + words[1] + " is there twice"};
    }
}

void readDevice(const Words &words, Record *record) {
    if (words.size() != 3 || !record->name.empty()) {
        throw Malformed{"expected one line: device NUMBER NAME"};
    }
    const size_t number = readNumber(words[1]);
    if (number >= INFINI_DEVICE_TYPE_COUNT) {
        throw Malformed{"there is no device type " + words[1]};
    }
    record->device = infiniDevice_t(number);
    record->name = words[2];
}

void readLine(const Words &words, Record *record) {
    const auto oneFlag = [&] {
        if (words.size() != 2) {
            throw Malformed{words[0] + " takes 0 or 1"};
        }
        return readFlag(words[1]);
    };
    if (words[0] == "op") {
        readOp(words, record);
    } else if (words[0] == "device") {
        readDevice(words, record);
    } else if (words[0] == "graph_capture") {
        record->graph_capture = oneFlag();
    } else if (words[0] == "collective_capture") {
        record->collective_capture = oneFlag();
    } else if (words[0] == "uncertain_ok") {
        record->uncertain_ok = oneFlag();
    } else if (words[0] == "collectives") {
        record->collectives.assign(words.begin() + 1, words.end());
    } else if (words[0] == "collective_dtypes") {
        record->collective_dtypes.clear();
        for (size_t i = 1; i < words.size(); ++i) {
            record->collective_dtypes.push_back(readDtype(words[i]));
        }
    } else {
        throw Malformed{"unknown key '" + words[0] + "'"};
    }
}

} // namespace

const char *dtypeName(infiniDtype_t dtype) {
    return dtype >= 0 && dtype <= INFINI_DTYPE_BF16 ? DTYPE_NAMES[dtype] : "?";
}

bool parseRecord(const std::string &text, Record *record, std::string *error) {
    size_t number = 0;
    try {
        std::istringstream stream(text);
        for (std::string line; std::getline(stream, line);) {
            ++number;
            const Words words = split(line, ' ');
            if (!words.empty()) {
                readLine(words, record);
            }
        }
    } catch (const Malformed &malformed) {
        *error = "line " + std::to_string(number) + ": " + malformed.message;
        return false;
    }
    if (record->name.empty()) {
        *error = "there is no line: device NUMBER NAME";
        return false;
    }
    return true;
}

} // namespace infinirt_cpu
