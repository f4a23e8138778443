//! `Debug` of messages that carry secrets: requests are logged, credentials never are.

use crate::cri::AuthConfig;
use std::fmt;

/// Shows only whether something is there.
struct Hidden<'a>(&'a str);

impl fmt::Debug for Hidden<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "\"\"" } else { "[hidden]" })
    }
}

impl fmt::Debug for AuthConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AuthConfig")
            .field("username", &self.username)
            .field("password", &Hidden(&self.password))
            .field("auth", &Hidden(&self.auth))
            .field("server_address", &self.server_address)
            .field("identity_token", &Hidden(&self.identity_token))
            .field("registry_token", &Hidden(&self.registry_token))
            .finish()
    }
}
