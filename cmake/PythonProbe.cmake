# Questions to Python. Packages are located without importing them: that is fast, and works for a package whose own
# dependencies are missing.

# Sets `out` to what `code` prints; to nothing when it fails.
function(fwpkm_ask_python out code)
  execute_process(COMMAND ${Python_EXECUTABLE} ${ARGN} -c "${code}"
    OUTPUT_VARIABLE answer OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  set(${out} "${answer}" PARENT_SCOPE)
endfunction()

# Sets `out` to the folder of an installed package; to nothing when there is none. The second try, with -I, drops
# pip's build isolation and so sees the environment that pip itself was started from.
function(fwpkm_python_package out package)
  foreach(mode "" -I)
    fwpkm_ask_python(folder
      "import importlib.util as u; s = u.find_spec('${package}'); print(s.submodule_search_locations[0] if s else '')"
      ${mode})
    if(folder)
      break()
    endif()
  endforeach()
  set(${out} "${folder}" PARENT_SCOPE)
endfunction()
