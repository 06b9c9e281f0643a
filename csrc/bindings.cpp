// The Python module flexrec._core: conversions between Python and the core, nothing else. flexrec/rankings/state.py
// checks shapes and documents; here arrays arrive contiguous and of the right type.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "flexrec/encode.hpp"
#include "flexrec/grammar.hpp"
#include "flexrec/parse.hpp"
#include "flexrec/permutation.hpp"
#include "flexrec/ranking_state.hpp"

namespace py = pybind11;

namespace {

using Int64Array = py::array_t<std::int64_t, py::array::c_style>;
using Int32Array = py::array_t<std::int32_t, py::array::c_style>;
using BoolArray = py::array_t<bool, py::array::c_style>;

// ------------------------------------------------------------------------------------------------ Python to the core

// The elements of a sequence (list, tuple, array, tensor); `name` says which one in the error for anything else.
template <class Name>
py::object elements_of(py::handle object, const char* expected, const Name& name) {
  const bool is_text = PyUnicode_Check(object.ptr()) || PyBytes_Check(object.ptr());
  PyObject* fast = is_text ? nullptr : PySequence_Fast(object.ptr(), "");
  if (fast == nullptr) {
    PyErr_Clear();
    throw py::type_error(name() + " must be a sequence of " + expected + ", got " +
                         std::string(py::str(py::type::handle_of(object).attr("__name__"))));
  }
  return py::reinterpret_steal<py::object>(fast);
}

template <class Name>
void append_tokens(py::handle object, std::vector<std::int32_t>& tokens, const Name& name) {
  const py::object elements = elements_of(object, "token ids", name);
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(elements.ptr());
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* element = PySequence_Fast_GET_ITEM(elements.ptr(), i);
    // A list of ints is what most callers have; anything else that stands for an integer is asked for it.
    const auto index = PyLong_CheckExact(element) ? py::reinterpret_borrow<py::object>(element)
                                                  : py::reinterpret_steal<py::object>(PyNumber_Index(element));
    if (!index) {
      PyErr_Clear();
      throw py::type_error(name() + "[" + std::to_string(i) + "] must be an integer token id, got " +
                           std::string(py::str(py::type::handle_of(element).attr("__name__"))));
    }
    int overflow = 0;
    const long long token = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
    if (overflow != 0 || token < 0 || token > std::numeric_limits<std::int32_t>::max()) {
      throw py::value_error(name() + " must hold token ids from 0 to 2147483647, got " + std::string(py::str(index)) +
                            " at index " + std::to_string(i));
    }
    tokens.push_back(static_cast<std::int32_t>(token));
  }
}

flexrec::CandidateTokens candidates_from_python(py::handle object) {
  flexrec::CandidateTokens result;
  const py::object lists = elements_of(object, "candidate lists", [] { return std::string("candidates"); });
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(lists.ptr()); ++i) {
    const auto list_name = [&] { return "candidates[" + std::to_string(i) + "]"; };
    const py::object list = elements_of(PySequence_Fast_GET_ITEM(lists.ptr(), i), "token sequences", list_name);
    for (Py_ssize_t k = 0; k < PySequence_Fast_GET_SIZE(list.ptr()); ++k) {
      append_tokens(PySequence_Fast_GET_ITEM(list.ptr(), k), result.tokens,
                    [&] { return list_name() + "[" + std::to_string(k) + "]"; });
      result.sequence_offsets.push_back(static_cast<std::int64_t>(result.tokens.size()));
    }
    result.list_offsets.push_back(static_cast<std::int64_t>(result.sequence_offsets.size()) - 1);
  }
  return result;
}

std::vector<std::int32_t> tokens_from_python(py::handle object, const std::string& name) {
  std::vector<std::int32_t> tokens;
  append_tokens(object, tokens, [&] { return name; });
  return tokens;
}

std::vector<std::int64_t> to_vector(const Int64Array& array) { return {array.data(), array.data() + array.size()}; }

using Tries = std::shared_ptr<flexrec::CandidateTries>;
using Grammar = std::shared_ptr<flexrec::RankingGrammar>;

Tries make_tries(py::handle candidates) {
  flexrec::CandidateTokens tokens = candidates_from_python(candidates);
  const py::gil_scoped_release release;
  return std::make_shared<flexrec::CandidateTries>(std::move(tokens));
}

Tries tries_from_arrays(const Int32Array& tokens, const Int64Array& sequence_offsets, const Int64Array& list_offsets) {
  flexrec::CandidateTokens candidates{
      {tokens.data(), tokens.data() + tokens.size()}, to_vector(sequence_offsets), to_vector(list_offsets)};
  const py::gil_scoped_release release;
  return std::make_shared<flexrec::CandidateTries>(std::move(candidates));
}

Grammar make_grammar(const Tries& tries, py::handle separator, py::handle end, std::optional<std::int64_t> at_most,
                     const std::optional<Int64Array>& by_row, std::int64_t num_generations) {
  std::vector<std::int32_t> separator_tokens = tokens_from_python(separator, "separator");
  std::vector<std::int32_t> end_tokens = tokens_from_python(end, "end");
  flexrec::NumRanked num_ranked{at_most, by_row ? to_vector(*by_row) : std::vector<std::int64_t>{}};
  const py::gil_scoped_release release;
  return std::make_shared<flexrec::RankingGrammar>(tries, std::move(separator_tokens), std::move(end_tokens),
                                                   num_ranked, num_generations);
}

// ------------------------------------------------------------------------------------------------ the core to Python

// Hands the vector's memory to numpy, without a copy.
template <class T>
py::array_t<T> to_array(std::vector<T>&& values, std::vector<py::ssize_t> shape) {
  auto owned = std::make_unique<std::vector<T>>(std::move(values));
  const T* data = owned->data();
  const py::capsule owner(owned.get(), [](void* memory) { delete static_cast<std::vector<T>*>(memory); });
  owned.release();
  return py::array_t<T>(std::move(shape), data, owner);
}

template <class T>
py::array_t<T> to_array(std::vector<T>&& values) {
  const auto size = static_cast<py::ssize_t>(values.size());
  return to_array(std::move(values), {size});
}

py::array to_bools(std::vector<std::uint8_t>&& values) { return to_array(std::move(values)).attr("view")("bool"); }

py::tuple to_arrays(flexrec::Csr&& csr) {
  return py::make_tuple(to_array(std::move(csr.ids)), to_array(std::move(csr.offsets)));
}

// ------------------------------------------------------------------------------------------------ the module

// A state that several Python threads may call: the GIL is not there to keep them apart while the core works.
class SharedState {
 public:
  explicit SharedState(const Grammar& grammar) : state_(grammar) {}

  // Calls work(state) without the GIL, one thread at a time.
  template <class Work>
  auto use(Work&& work) {
    const py::gil_scoped_release release;
    return use_without_gil(work);
  }

  // The same for a thread that has released the GIL already.
  template <class Work>
  auto use_without_gil(Work&& work) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return work(state_);
  }

  std::int64_t num_rows() const { return state_.num_rows(); }
  std::int32_t max_num_ranked() const { return state_.max_num_ranked(); }

 private:
  flexrec::RankingState state_;
  std::mutex mutex_;
};

void advance(SharedState& self, const Int64Array& tokens, const std::optional<Int64Array>& offsets, bool strict) {
  using OnRejected = flexrec::RankingState::OnRejected;
  const std::int64_t* token_data = tokens.data();
  const std::int64_t* offset_data = offsets ? offsets->data() : nullptr;
  const OnRejected on_rejected = strict ? OnRejected::kThrow : OnRejected::kLose;
  self.use([&](flexrec::RankingState& state) { state.advance(token_data, offset_data, on_rejected); });
}

void restart(SharedState& self, const std::optional<BoolArray>& rows) {
  const auto* chosen = rows ? reinterpret_cast<const std::uint8_t*>(rows->data()) : nullptr;
  self.use([&](flexrec::RankingState& state) { state.restart(chosen); });
}

// `set_ids` and `set_offsets` say which bits are set in `words`; returns which are set now.
py::tuple allowed_bitmask(SharedState& self, std::int64_t vocab_size, Int32Array& words, const Int32Array& set_ids,
                          const Int64Array& set_offsets) {
  flexrec::Csr set{{set_ids.data(), set_ids.data() + set_ids.size()}, to_vector(set_offsets)};
  std::int32_t* data = words.mutable_data();
  const std::int64_t words_per_row = words.shape(1);
  self.use([&](const flexrec::RankingState& state) { state.allowed_bitmask(vocab_size, data, words_per_row, set); });
  return to_arrays(std::move(set));
}

// The rows of all states one after the other: the caller has checked that `offsets` has an entry for each and one more.
py::tuple step_states(const std::vector<SharedState*>& states, const Int64Array& tokens, const Int64Array& offsets) {
  const std::int64_t* token_data = tokens.data();
  const std::int64_t* offset_data = offsets.data();
  flexrec::StepResult result = [&] {
    const py::gil_scoped_release release;
    flexrec::StepResult joint;
    for (SharedState* const state : states) {
      state->use_without_gil([&](flexrec::RankingState& one) { flexrec::step(one, token_data, offset_data, joint); });
      offset_data += state->num_rows();
    }
    return joint;
  }();
  return py::make_tuple(to_array(std::move(result.allowed.ids)), to_array(std::move(result.allowed.offsets)),
                        to_bools(std::move(result.done)));
}

py::array rankings(SharedState& self) {
  std::vector<std::int32_t> result = self.use([](const flexrec::RankingState& state) { return state.rankings(); });
  return to_array(std::move(result), {self.num_rows(), self.max_num_ranked()});
}

py::tuple parse_rankings(const flexrec::RankingGrammar& grammar, const Int64Array& tokens, const Int64Array& offsets) {
  const std::int64_t* token_data = tokens.data();
  const std::int64_t* offset_data = offsets.data();
  flexrec::ParsedBatch parsed = [&] {
    const py::gil_scoped_release release;
    return flexrec::parse_rankings(grammar, token_data, offset_data);
  }();
  return py::make_tuple(to_array(std::move(parsed.ranking), {grammar.num_rows(), grammar.max_num_ranked()}),
                        to_bools(std::move(parsed.valid)), to_array(std::move(parsed.repeated)),
                        to_array(std::move(parsed.missing)), to_array(std::move(parsed.unknown)),
                        to_array(std::move(parsed.item_ids)));
}

py::tuple encode_rankings(const flexrec::RankingGrammar& grammar, const Int64Array& rankings, bool with_allowed) {
  const std::int64_t* data = rankings.data();
  const std::int64_t width = rankings.shape(1);
  flexrec::EncodedBatch encoded = [&] {
    const py::gil_scoped_release release;
    return flexrec::encode_rankings(grammar, data, width, with_allowed);
  }();
  return py::make_tuple(to_array(std::move(encoded.tokens)), to_array(std::move(encoded.offsets)),
                        to_array(std::move(encoded.item_ids)), to_array(std::move(encoded.decision_rows)),
                        to_array(std::move(encoded.decision_positions)), to_array(std::move(encoded.decision_ranks)),
                        to_array(std::move(encoded.targets)), to_array(std::move(encoded.allowed_ids)),
                        to_array(std::move(encoded.allowed_offsets)), to_array(std::move(encoded.below_items)),
                        to_array(std::move(encoded.below_offsets)));
}

py::array inverse_permutation(const Int64Array& rankings, const Int64Array& num_candidates) {
  const std::vector<std::int64_t> counts = to_vector(num_candidates);
  const std::int64_t* data = rankings.data();
  const std::int64_t num_rows = rankings.shape(0);
  const std::int64_t width = rankings.shape(1);
  std::vector<std::int32_t> ranks = [&] {
    const py::gil_scoped_release release;
    return flexrec::inverse_permutations(data, num_rows, width, counts);
  }();
  const py::ssize_t columns = num_rows == 0 ? 0 : static_cast<py::ssize_t>(ranks.size()) / num_rows;
  return to_array(std::move(ranks), {num_rows, columns});
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "The C++ core of flexrec.rankings, which is its public face.";

  py::class_<flexrec::CandidateTries, Tries>(module, "CandidateTries")
      .def(py::init(&make_tries), py::arg("candidates"))
      .def_static("from_arrays", &tries_from_arrays, py::arg("tokens").noconvert(),
                  py::arg("sequence_offsets").noconvert(), py::arg("list_offsets").noconvert())
      .def_property_readonly("num_lists", [](const flexrec::CandidateTries& self) { return self.num_lists(); });

  py::class_<flexrec::RankingGrammar, Grammar>(module, "RankingGrammar")
      .def(py::init(&make_grammar), py::arg("tries"), py::arg("separator"), py::arg("end"), py::arg("at_most"),
           py::arg("by_row"), py::arg("num_generations"))
      .def_property_readonly("num_rows", &flexrec::RankingGrammar::num_rows)
      .def_property_readonly("max_length", &flexrec::RankingGrammar::max_length)
      .def_property_readonly("max_token", &flexrec::RankingGrammar::max_token);

  py::class_<SharedState>(module, "RankingState")
      .def(py::init<Grammar>(), py::arg("grammar"))
      .def_property_readonly("num_rows", &SharedState::num_rows)
      .def("allowed",
           [](SharedState& self) { return to_arrays(self.use([](const auto& state) { return state.allowed(); })); })
      .def("forced",
           [](SharedState& self) { return to_arrays(self.use([](const auto& state) { return state.forced(); })); })
      .def("allowed_bitmask", &allowed_bitmask, py::arg("vocab_size"), py::arg("words").noconvert(),
           py::arg("set_ids").noconvert(), py::arg("set_offsets").noconvert())
      .def("advance", &advance, py::arg("tokens").noconvert(), py::arg("offsets").noconvert(), py::arg("strict"))
      .def("restart", &restart, py::arg("rows").noconvert())
      .def("done", [](SharedState& self) { return to_bools(self.use([](const auto& state) { return state.done(); })); })
      .def("rankings", &rankings);

  module.def("step_states", &step_states, py::arg("states"), py::arg("tokens").noconvert(),
             py::arg("offsets").noconvert());
  module.def("parse_rankings", &parse_rankings, py::arg("grammar"), py::arg("tokens").noconvert(),
             py::arg("offsets").noconvert());
  module.def("encode_rankings", &encode_rankings, py::arg("grammar"), py::arg("rankings").noconvert(),
             py::arg("with_allowed"));
  module.def("inverse_permutation", &inverse_permutation, py::arg("rankings").noconvert(),
             py::arg("num_candidates").noconvert());
}
