//! The one place where a [`Fault`] becomes a status of gRPC or ttrpc.

use kernel::{Class, Fault};
use proto::ttrpc;
use tonic::{Code, Status};

/// Where an operation was when it failed: the end of every error text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Operation id.
    pub op: u64,
    /// Step it was in, and what that waited for.
    pub step: String,
    /// Trace id.
    pub trace: String,
}

impl Place {
    /// `text (op=7 step=network.add trace=4bf9…)`.
    fn after(&self, text: &str) -> String {
        let step = if self.step.is_empty() { "none" } else { &self.step };
        format!("{text} (op={} step={step} trace={})", self.op, self.trace)
    }
}

/// A fault as gRPC gives it to a client.
pub fn grpc(fault: &Fault, place: &Place) -> Status {
    Status::new(code(fault.class), place.after(&fault.message))
}

/// A fault as ttrpc gives it to a shim.
pub fn ttrpc(fault: &Fault, place: &Place) -> ttrpc::Error {
    proto::glue::fault(ttrpc_code(fault.class), place.after(&fault.message))
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
        let place = Place { op: 7, step: "network.add".into(), trace: "4bf9".into() };
        let status = grpc(&Fault::new(Class::DeadlineExceeded, "run pod p1: timed out"), &place);
        assert_eq!(status.code(), Code::DeadlineExceeded);
        assert_eq!(status.message(), "run pod p1: timed out (op=7 step=network.add trace=4bf9)");
    }
}
