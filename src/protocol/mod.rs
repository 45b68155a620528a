//! How a program takes its call and gives its answer.

pub mod exec;
pub mod grpc;
mod json;

use crate::{artifact::elf::Executable, jail::message::SCRIPT_PATH};

/// What a program calls itself.
const PROGRAM: &str = "service";

/// What argv begins with. For a script as the kernel would make it begin: the interpreter,
/// its argument, the path under which the script is shown.
fn command(executable: &Executable) -> Vec<String> {
    match executable {
        Executable::Script { interpreter, argument } => {
            let mut argv = vec![interpreter.clone()];
            argv.extend(argument.clone());
            argv.push(SCRIPT_PATH.to_owned());
            argv
        }
        Executable::Static | Executable::Dynamic { .. } => vec![PROGRAM.to_owned()],
    }
}
