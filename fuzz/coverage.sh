#!/bin/sh
# rustc, with the counters of libFuzzer in the crates that decode. A wrapper, so that no dependency and no build script has them.
case " $* " in
*" --crate-name aether_cas "* | *" --crate-name aether_lazy "* | *" --crate-name aether_store_node "* | *" --crate-name aether_fuzz "*)
    case " $* " in
    *" --crate-type lib "*)
        exec "$@" -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
            -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table
        ;;
    esac
    ;;
esac
exec "$@"
