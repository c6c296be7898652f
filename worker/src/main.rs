//! `aether-worker`: runs one command with a time limit, as `timeout(1)` does, and as a proper first process of a container.
//!
//! A small static program without a runtime, so that it can be copied into any image: an init container puts it into
//! an `emptyDir` (`install`), the command's container starts it from there (`run`), and a sandbox image is nothing but
//! it (`pause`).

mod arguments;
mod duration;
mod install;
mod run;
mod signals;

use std::process::ExitCode;

use arguments::Mode;

/// What `timeout(1)` exits with when it fails itself, not its command.
const FAILED: u8 = 125;

fn main() -> ExitCode {
    let mode = match arguments::parse(std::env::args_os().skip(1)) {
        Ok(mode) => mode,
        Err(message) => {
            eprintln!("aether-worker: {message}");
            eprintln!("Try 'aether-worker --help'.");
            return ExitCode::from(FAILED);
        }
    };
    let outcome = match mode {
        Mode::Help => {
            print!("{}", arguments::HELP);
            Ok(0)
        }
        Mode::Version => {
            println!("aether-worker {}", env!("CARGO_PKG_VERSION"));
            Ok(0)
        }
        Mode::Install { directory } => install::install(&directory).map(|path| {
            println!("{}", path.display());
            0
        }),
        Mode::Pause => run::pause(),
        Mode::Run(command) => run::run(&command),
    };
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(message) => {
            eprintln!("aether-worker: {message}");
            ExitCode::from(FAILED)
        }
    }
}
