//! How the end of a command is told: `metav1.Status` as JSON from version 4 on, plain text of failures before.
use kernel::{Class, Fault, Result};
use serde_json::json;

/// The bytes for the error stream; empty = nothing to tell.
pub(crate) fn encode(version: u8, result: &Result<i32>) -> Vec<u8> {
    if version < 4 {
        return match result {
            Ok(0) => vec![],
            Ok(code) => format!("command terminated with non-zero exit code: {code}").into_bytes(),
            Err(fault) => fault.to_string().into_bytes(),
        };
    }
    let status = match result {
        Ok(0) => json!({"metadata": {}, "status": "Success"}),
        Ok(code) => {
            json!({"metadata": {}, "status": "Failure", "message": format!("command terminated with non-zero exit code: exit status {code}"),
            "reason": "NonZeroExitCode", "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]}, "code": 500})
        }
        Err(fault) => {
            let (reason, code) = match fault.class {
                Class::NotFound => ("NotFound", 404),
                _ => ("InternalError", 500),
            };
            json!({"metadata": {}, "status": "Failure", "message": fault.to_string(), "reason": reason,
                "details": {"causes": [{"message": fault.to_string()}]}, "code": code})
        }
    };
    status.to_string().into_bytes()
}

/// A failure before any stream.
pub(crate) fn late(what: &str) -> Fault {
    Fault::deadline_exceeded(format!("the client did not make its streams in time: {what}"))
}
