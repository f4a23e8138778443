//! The one place where a [`Fault`] becomes a status of gRPC or ttrpc.

use kernel::{Class, Fault};
use proto::ttrpc;
use std::fmt;
use tonic::{Code, Status};

/// A fault, and where the operation was when it happened. As text: `run pod p1: timed out (op=7 step="network.add" trace=4bf9…)`.
#[derive(Debug)]
pub struct Failure {
    /// What.
    pub fault: Fault,
    /// Operation, step, what that waits for, trace: as the kernel describes it.
    pub place: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.fault.message, self.place)
    }
}

/// A failure as gRPC gives it to a client.
pub fn grpc(failure: &Failure) -> Status {
    Status::new(code(failure.fault.class), failure.to_string())
}

/// A failure as ttrpc gives it to a shim.
pub fn ttrpc(failure: &Failure) -> ttrpc::Error {
    proto::glue::fault(ttrpc_code(failure.fault.class), failure)
}

/// gRPC's code of a class.
pub fn code(class: Class) -> Code {
    match class {
        Class::Unknown => Code::Unknown,
        Class::InvalidArgument => Code::InvalidArgument,
        Class::NotFound => Code::NotFound,
        Class::AlreadyExists => Code::AlreadyExists,
        Class::FailedPrecondition => Code::FailedPrecondition,
        Class::PermissionDenied => Code::PermissionDenied,
        Class::Unauthenticated => Code::Unauthenticated,
        Class::ResourceExhausted => Code::ResourceExhausted,
        Class::OutOfRange => Code::OutOfRange,
        Class::Unimplemented => Code::Unimplemented,
        Class::Internal => Code::Internal,
        Class::Unavailable => Code::Unavailable,
        Class::DataLoss => Code::DataLoss,
        Class::DeadlineExceeded => Code::DeadlineExceeded,
        Class::Canceled => Code::Cancelled,
        Class::Aborted => Code::Aborted,
    }
}

/// ttrpc uses gRPC's numbers under names of its own.
fn ttrpc_code(class: Class) -> ttrpc::Code {
    match class {
        Class::Unknown => ttrpc::Code::UNKNOWN,
        Class::InvalidArgument => ttrpc::Code::INVALID_ARGUMENT,
        Class::NotFound => ttrpc::Code::NOT_FOUND,
        Class::AlreadyExists => ttrpc::Code::ALREADY_EXISTS,
        Class::FailedPrecondition => ttrpc::Code::FAILED_PRECONDITION,
        Class::PermissionDenied => ttrpc::Code::PERMISSION_DENIED,
        Class::Unauthenticated => ttrpc::Code::UNAUTHENTICATED,
        Class::ResourceExhausted => ttrpc::Code::RESOURCE_EXHAUSTED,
        Class::OutOfRange => ttrpc::Code::OUT_OF_RANGE,
        Class::Unimplemented => ttrpc::Code::UNIMPLEMENTED,
        Class::Internal => ttrpc::Code::INTERNAL,
        Class::Unavailable => ttrpc::Code::UNAVAILABLE,
        Class::DataLoss => ttrpc::Code::DATA_LOSS,
        Class::DeadlineExceeded => ttrpc::Code::DEADLINE_EXCEEDED,
        Class::Canceled => ttrpc::Code::CANCELLED,
        Class::Aborted => ttrpc::Code::ABORTED,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    const ALL: [Class; 16] = [
        Class::Canceled,
        Class::Unknown,
        Class::InvalidArgument,
        Class::DeadlineExceeded,
        Class::NotFound,
        Class::AlreadyExists,
        Class::PermissionDenied,
        Class::ResourceExhausted,
        Class::FailedPrecondition,
        Class::Aborted,
        Class::OutOfRange,
        Class::Unimplemented,
        Class::Internal,
        Class::Unavailable,
        Class::DataLoss,
        Class::Unauthenticated,
    ];

    /// The order above is the order of gRPC's numbers, from 1.
    #[test]
    fn every_class_has_its_number_on_both_wires() {
        for (number, class) in (1..).zip(ALL) {
            assert_eq!(code(class) as i32, number, "{class:?}");
            assert_eq!(ttrpc_code(class) as i32, number, "{class:?}");
        }
    }

    #[test]
    fn the_text_ends_with_the_place() {
        let fault = Fault::new(Class::DeadlineExceeded, "run pod p1: timed out");
        let status = grpc(&Failure { fault, place: "op=7 step=\"network.add\" trace=4bf9".into() });
        assert_eq!(status.code(), Code::DeadlineExceeded);
        assert_eq!(status.message(), "run pod p1: timed out (op=7 step=\"network.add\" trace=4bf9)");
    }
}
